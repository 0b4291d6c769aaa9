"""Sources of a run and their weights: Megatron's ``--data-path``."""

import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np

from moetron.common.data_path import split_data_path
from moetron.common.errors import UserError
from moetron.data.addressing.windowing import Windowing
from moetron.data.shards.shard import Shard
from moetron.data.shards.shard_set import members


@dataclass(frozen=True)
class Source:
    """A shard or a shard set, divided into samples."""

    prefix: str
    shards: tuple[Shard, ...]
    windowing: Windowing

    def __post_init__(self) -> None:
        """Raise UserError if the source has fewer tokens than one sample."""
        if self.windows == 0:
            raise UserError(
                f"{self.prefix}: {self.tokens} tokens in {sum(map(len, self.shards))} "
                "documents are too few for one sample of this --seq-length "
                f"(needs {self.windowing.place(0)[2]})"
            )

    @property
    def name(self) -> str:
        """Return the prefix without its folders."""
        return source_name(self.prefix)

    @property
    def tokens(self) -> int:
        """Return the number of tokens of all shards."""
        return sum(shard.token_count for shard in self.shards)

    @property
    def windows(self) -> int:
        """Return the number of samples in one epoch."""
        return self._ends[-1]

    @cached_property
    def _ends(self) -> list[int]:
        """Return the end of each shard's range of window numbers."""
        return list(accumulate(self.windowing.count(shard.token_count) for shard in self.shards))

    def read(self, window: int) -> tuple[int, np.ndarray]:
        """Return the slot in the windowing's cycle and the tokens of one window."""
        number = bisect_right(self._ends, window)
        first = self._ends[number - 1] if number else 0
        slot, start, end = self.windowing.place(window - first)
        return slot, self.shards[number].tokens[start:end]


@dataclass(frozen=True)
class Blend:
    """Sources and their weights (positive, any sum)."""

    sources: tuple[Source, ...]
    weights: tuple[float, ...]


def open_blend(
    data_path: Sequence[str],
    windowing: Windowing | int,
    expected_fingerprint: str | None = None,
    own_windowings: Mapping[str, Windowing] | None = None,
) -> Blend:
    """Open ``[PREFIX]``, ``[PREFIX, PREFIX, ...]`` (by size) or ``[WEIGHT, PREFIX, ...]``.

    A prefix may name a shard set (``moetron.data.shards.shard_set``), which is one source.

    Args:
        data_path: Megatron's ``--data-path``.
        windowing: Division of shards into samples; an int is the sequence length of causal samples.
        expected_fingerprint: Tokenizer that all shards must have been made with.
        own_windowings: Windowings of sources that use another one, by source name.

    Raises:
        UserError: the list has another form, a shard cannot be used, or its tokenizer is not the
        expected one. Shards without a manifest cannot be checked and are accepted.
    """
    weights, prefixes = split_data_path(data_path)
    if isinstance(windowing, int):
        windowing = Windowing((windowing,), overlap=1)
    own_windowings = own_windowings or {}
    checked = os.environ.get("RANK", "0") != "0"  # by rank 0: thousands of ranks may share a disk
    sources = tuple(
        Source(
            prefix,
            tuple(Shard(name, checked) for name in members(prefix)),
            own_windowings.get(source_name(prefix), windowing),
        )
        for prefix in prefixes
    )
    if expected_fingerprint is not None:
        _check_fingerprints(sources, expected_fingerprint)
    by_size = tuple(float(source.windows) for source in sources)
    return Blend(sources, tuple(weights) if weights else by_size)


def source_name(prefix: str) -> str:
    """Return the prefix without its folders."""
    return Path(prefix).name


def _check_fingerprints(sources: Sequence[Source], expected: str) -> None:
    """Raise UserError that lists all shards of another tokenizer."""
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
            "give the tokenizer of the shards or preprocess again"
        )
