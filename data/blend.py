"""Which sources a run reads and in what proportions: Megatron's ``--data-path``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moetron.data.cutting import Cutting
from moetron.data.errors import DataError
from moetron.data.family import members
from moetron.data.shard import Shard


@dataclass(frozen=True)
class Source:
    """One shard, cut into samples."""

    shard: Shard
    cutting: Cutting

    def __post_init__(self) -> None:
        """Refuse a shard without a single sample."""
        if self.windows == 0:
            raise DataError(
                f"{self.shard.prefix}: {len(self.shard.tokens)} tokens in {len(self.shard)} "
                "documents are too few for one sample of this --seq-length "
                f"(needs {self.cutting.place(0)[2]})"
            )

    @property
    def name(self) -> str:
        """The prefix without its folders."""
        return Path(self.shard.prefix).name

    @property
    def windows(self) -> int:
        """Samples of one epoch."""
        return self.cutting.count(len(self.shard.tokens))


@dataclass(frozen=True)
class Blend:
    """Sources and their weights (positive, of any sum)."""

    sources: tuple[Source, ...]
    weights: tuple[float, ...]


def open_blend(
    data_path: Sequence[str], cutting: Cutting | int, expected_fingerprint: str | None = None
) -> Blend:
    """Open ``[PREFIX]``, ``[PREFIX, PREFIX, ...]`` (by size) or ``[WEIGHT, PREFIX, ...]``.

    A prefix may name a family of shards (``moetron.data.family``): each is a source, and they
    share the weight by size.

    Args:
        data_path: Megatron's ``--data-path``.
        cutting: How shards are cut into samples; an int is the sequence length of causal samples.
        expected_fingerprint: The tokenizer that all shards must be made with.

    Raises:
        DataError: the list has another form, a shard cannot be used, or the tokenizer of one is not
            the expected one. Shards without a manifest cannot be checked and are taken as they are.
    """
    weights, prefixes = split_data_path(data_path)
    if isinstance(cutting, int):
        cutting = Cutting((cutting,), overlap=1)
    families = [_open_family(prefix, cutting) for prefix in prefixes]
    sources = tuple(source for family in families for source in family)
    if expected_fingerprint is not None:
        _check_fingerprints(sources, expected_fingerprint)
    shares = weights or [sum(source.windows for source in family) for family in families]
    return Blend(
        sources,
        tuple(
            share * (source.windows / sum(each.windows for each in family))
            for share, family in zip(shares, families, strict=True)
            for source in family
        ),
    )


def _open_family(prefix: str, cutting: Cutting) -> list[Source]:
    """The shard of a prefix, or those of its family that hold a sample."""
    shards = [Shard(name) for name in members(prefix)]
    large = [shard for shard in shards if cutting.count(len(shard.tokens))]
    return [Source(shard, cutting) for shard in large or shards[:1]]


def split_data_path(data_path: Sequence[str]) -> tuple[list[float] | None, list[str]]:
    """(weights or None, prefixes) of a data path."""
    if not data_path:
        raise DataError("--data-path is empty: give PREFIX or WEIGHT PREFIX WEIGHT PREFIX ...")
    if _number(data_path[0]) is None:
        return None, list(data_path)
    weights = [_number(word) for word in data_path[::2]]
    prefixes = list(data_path[1::2])
    if len(weights) != len(prefixes) or None in weights:
        raise DataError(
            f"--data-path {' '.join(data_path)}: weights and prefixes must alternate: "
            "WEIGHT PREFIX WEIGHT PREFIX ..."
        )
    return [weight for weight in weights if weight is not None], prefixes


def _number(word: str) -> float | None:
    """The number that a word spells, if it spells one."""
    try:
        return float(word)
    except ValueError:
        return None


def _check_fingerprints(sources: Sequence[Source], expected: str) -> None:
    """Refuse shards of another tokenizer, all at once."""
    wrong = [
        f"{source.shard.prefix} (tokenizer {manifest.tokenizer.name}, "
        f"{manifest.tokenizer.fingerprint[:12]})"
        for source in sources
        if (manifest := source.shard.manifest) and manifest.tokenizer.fingerprint != expected
    ]
    if wrong:
        raise DataError(
            f"made with another tokenizer than this run's ({expected[:12]}): {', '.join(wrong)}; "
            "give the run that tokenizer or preprocess the text again"
        )
