"""Which sources a run reads and in what proportions: Megatron's ``--data-path``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moetron.data.errors import DataError
from moetron.data.shard import Shard


@dataclass(frozen=True)
class Source:
    """One shard, cut into windows of ``seq_length + 1`` tokens that overlap by one.

    Every token but a tail of less than ``seq_length`` is predicted exactly once an epoch.
    """

    shard: Shard
    seq_length: int

    def __post_init__(self) -> None:
        """Refuse a shard without a single window."""
        if self.windows == 0:
            raise DataError(
                f"{self.shard.prefix}: {len(self.shard.tokens)} tokens in {len(self.shard)} "
                f"documents are too few for one sample of --seq-length {self.seq_length} "
                f"(needs {self.seq_length + 1})"
            )

    @property
    def name(self) -> str:
        """The prefix without its folders."""
        return Path(self.shard.prefix).name

    @property
    def windows(self) -> int:
        """Samples of one epoch."""
        return max(0, len(self.shard.tokens) - 1) // self.seq_length


@dataclass(frozen=True)
class Blend:
    """Sources and their weights (positive, of any sum)."""

    sources: tuple[Source, ...]
    weights: tuple[float, ...]


def open_blend(
    data_path: Sequence[str], seq_length: int, expected_fingerprint: str | None = None
) -> Blend:
    """Open ``[PREFIX]``, ``[PREFIX, PREFIX, ...]`` (by size) or ``[WEIGHT, PREFIX, ...]``.

    Raises:
        DataError: the list has another form, a shard cannot be used, or the tokenizer of one is not
            the expected one. Shards without a manifest cannot be checked and are taken as they are.
    """
    weights, prefixes = split_data_path(data_path)
    sources = tuple(Source(Shard(prefix), seq_length) for prefix in prefixes)
    if expected_fingerprint is not None:
        _check_fingerprints(sources, expected_fingerprint)
    by_size = tuple(float(source.windows) for source in sources)
    return Blend(sources, tuple(weights) if weights else by_size)


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
