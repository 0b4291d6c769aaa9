"""What the training loop asks of data: numbered samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


class SampleStream(Protocol):
    """Samples by number, so that any rank of any layout can ask for any of them.

    Sample n is a function of (data, settings, seed, n) alone. It holds ``tokens`` int64 [S],
    ``labels`` int64 [S] (``labels[i]`` follows ``tokens[i]``), ``loss_mask`` float32 [S], and the
    integers ``source``, the number of the corpus it came from; ``objective``, that of what it asks
    of the model; ``prefix``, how many of its first tokens may see each other in both directions (0:
    none); and ``filtered``, 1 if its loss is masked because it repeats itself.
    """

    source_names: list[str]
    objective_names: list[str]

    @property
    def bytes_per_token(self) -> list[float | None]:
        """Of each source's text; None where it is unknown, or where samples are not just text."""
        ...

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
        self.objective_names = stream.objective_names
        self.bytes_per_token = stream.bytes_per_token
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
class SourceUse:
    """What the whole run takes of one source, over all stages."""

    name: str
    tokens: int
    """Tokens of the source that the samples use up."""
    epochs: float
    """The samples, in passes through the source."""


@dataclass(frozen=True)
class Streams:
    """Where a run's samples come from."""

    training: SampleStream
    validation: SampleStream | None
    """None: no evaluation."""
    uses: Sequence[SourceUse] = ()
    """Of every source of the training stream; empty: synthetic samples."""
