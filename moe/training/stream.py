"""What the training loop asks of data: numbered samples."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


class SampleStream(Protocol):
    """Samples by number, so that any rank of any layout can ask for any of them.

    Sample n is a function of (data, settings, seed, n) alone. It holds ``tokens`` int64 [S],
    ``labels`` int64 [S] (``labels[i]`` follows ``tokens[i]``), ``loss_mask`` float32 [S] and
    ``source``, the number of the corpus it came from.
    """

    source_names: list[str]

    def __len__(self) -> int:
        """Samples that may be asked for; a training stream repeats its sources without end."""
        ...

    def __getitem__(self, n: int) -> Mapping[str, np.ndarray | int]:
        """Sample ``n``."""
        ...

    def state(self) -> dict[str, Any]:
        """What identifies the stream (JSON): sources, weights, seed, tokenizer fingerprint."""
        ...


class StreamFrom:
    """The samples of another stream from number ``first`` on, numbered from 0."""

    def __init__(self, stream: SampleStream, first: int) -> None:
        self.source_names = stream.source_names
        self._stream = stream
        self._first = first

    def __len__(self) -> int:
        """Samples that are left."""
        return len(self._stream) - self._first

    def __getitem__(self, n: int) -> Mapping[str, np.ndarray | int]:
        """Sample ``first + n`` of the other stream."""
        return self._stream[self._first + n]

    def state(self) -> dict[str, Any]:
        """What identifies the stream (JSON)."""
        return {**self._stream.state(), "first": self._first}


@dataclass(frozen=True)
class Streams:
    """Where a run's samples come from."""

    training: SampleStream
    validation: SampleStream | None
    """None: no evaluation."""
