"""Which sources a run reads and in what proportions: Megatron's ``--data-path``."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np

from moetron.common.data_path import split_data_path
from moetron.common.errors import UserError
from moetron.data.addressing.windowing import Cutting
from moetron.data.shards.shard import Shard
from moetron.data.shards.shard_set import members


@dataclass(frozen=True)
class Source:
    """A shard, or the shards of a family one after the other, each cut into samples."""

    prefix: str
    shards: tuple[Shard, ...]
    cutting: Cutting

    def __post_init__(self) -> None:
        """Refuse a source without a single sample."""
        if self.windows == 0:
            raise UserError(
                f"{self.prefix}: {self.tokens} tokens in {sum(map(len, self.shards))} "
                "documents are too few for one sample of this --seq-length "
                f"(needs {self.cutting.place(0)[2]})"
            )

    @property
    def name(self) -> str:
        """The prefix without its folders."""
        return source_name(self.prefix)

    @property
    def tokens(self) -> int:
        """Tokens of all shards."""
        return sum(len(shard.tokens) for shard in self.shards)

    @property
    def windows(self) -> int:
        """Samples of one epoch."""
        return self._ends[-1]

    @cached_property
    def _ends(self) -> list[int]:
        """The number of the window after each shard's last."""
        return list(accumulate(self.cutting.count(len(shard.tokens)) for shard in self.shards))

    def read(self, window: int) -> tuple[int, np.ndarray]:
        """The slot in the cutting's cycle and the tokens of one window."""
        number = bisect_right(self._ends, window)
        first = self._ends[number - 1] if number else 0
        slot, start, end = self.cutting.place(window - first)
        return slot, self.shards[number].tokens[start:end]


@dataclass(frozen=True)
class Blend:
    """Sources and their weights (positive, of any sum)."""

    sources: tuple[Source, ...]
    weights: tuple[float, ...]


def open_blend(
    data_path: Sequence[str],
    cutting: Cutting | int,
    expected_fingerprint: str | None = None,
    own_cuttings: Mapping[str, Cutting] | None = None,
) -> Blend:
    """Open ``[PREFIX]``, ``[PREFIX, PREFIX, ...]`` (by size) or ``[WEIGHT, PREFIX, ...]``.

    A prefix may name a family of shards (``moetron.data.shards.shard_set``): they are one source.

    Args:
        data_path: Megatron's ``--data-path``.
        cutting: How shards are cut into samples; an int is the sequence length of causal samples.
        expected_fingerprint: The tokenizer that all shards must be made with.
        own_cuttings: By name, those of sources that are cut in another way.

    Raises:
        UserError: the list has another form, a shard cannot be used, or the tokenizer of one is not
            the expected one. Shards without a manifest cannot be checked and are taken as they are.
    """
    weights, prefixes = split_data_path(data_path)
    if isinstance(cutting, int):
        cutting = Cutting((cutting,), overlap=1)
    own_cuttings = own_cuttings or {}
    sources = tuple(
        Source(
            prefix,
            tuple(Shard(name) for name in members(prefix)),
            own_cuttings.get(source_name(prefix), cutting),
        )
        for prefix in prefixes
    )
    if expected_fingerprint is not None:
        _check_fingerprints(sources, expected_fingerprint)
    by_size = tuple(float(source.windows) for source in sources)
    return Blend(sources, tuple(weights) if weights else by_size)


def source_name(prefix: str) -> str:
    """The prefix without its folders."""
    return Path(prefix).name


def _check_fingerprints(sources: Sequence[Source], expected: str) -> None:
    """Refuse shards of another tokenizer, all at once."""
    wrong = [
        f"{shard.prefix} (tokenizer {manifest.tokenizer.name}, "
        f"{manifest.tokenizer.fingerprint[:12]})"
        for source in sources
        for shard in source.shards
        if (manifest := shard.manifest) and manifest.tokenizer.fingerprint != expected
    ]
    if wrong:
        raise UserError(
            f"made with another tokenizer than this run's ({expected[:12]}): {', '.join(wrong)}; "
            "give the run that tokenizer or preprocess the text again"
        )
