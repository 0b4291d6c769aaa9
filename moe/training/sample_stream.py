"""Interface of sample streams: samples by number."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


class SampleStream(Protocol):
    """Samples by number, so that any rank of any layout can read any of them.

    Sample n is a function of (data, settings, seed, n) only. It holds ``tokens`` int64 [S],
    ``labels`` int64 [S] (``labels[i]`` follows ``tokens[i]``), ``loss_mask`` float32 [S], and the
    integers ``source``, the number of its source; ``objective``, the number of its objective;
    ``prefix``, the length of its bidirectional prefix (0: none); and ``filtered``, 1 if its loss is
    masked because of repetition. Optionally ``documents``, integers [D] that add up to S, the
    lengths of documents that do not see each other, ``padding``, the number of tokens at the end
    that are padding, and weights of losses, ``loss_weight`` and ``loss_count`` (batches.py). Of an
    encoder-decoder also ``segments`` int64 [S], the example of each token (0: padding; examples of
    a sample do not see each other).
    """

    source_names: list[str]
    objective_names: list[str]

    @property
    def bytes_per_token(self) -> list[float | None]:
        """Mean of each source's text; None if unknown, or if samples are not plain text."""
        ...

    def __len__(self) -> int:
        """Return the number of samples; a training stream repeats its sources without end."""
        ...

    def __getitem__(self, n: int) -> Mapping[str, np.ndarray | int]:
        """Return sample ``n``."""
        ...

    def state(self) -> dict[str, Any]:
        """Return the stream's identity (JSON): sources, weights, seed, tokenizer fingerprint."""
        ...


class PreferenceStream(SampleStream, Protocol):
    """Pairs, or single answers, with the reference's log-probabilities in every sample."""

    rows_per_epoch: int
    reference: np.ndarray | None
    """float32, by number of conversation; mismatched ones last."""

    @property
    def conversation_count(self) -> int:
        """Return the number of conversations, mismatched ones included."""
        ...


class StreamFrom:
    """Samples of another stream from number ``first``, renumbered from 0."""

    def __init__(self, stream: SampleStream, first: int) -> None:
        self.source_names = stream.source_names
        self.objective_names = stream.objective_names
        self.bytes_per_token = stream.bytes_per_token
        self._stream = stream
        self._first = first

    def __len__(self) -> int:
        """Return the number of remaining samples."""
        return len(self._stream) - self._first

    def __getitem__(self, n: int) -> Mapping[str, np.ndarray | int]:
        """Return sample ``first + n`` of the other stream."""
        return self._stream[self._first + n]

    def state(self) -> dict[str, Any]:
        """Return the stream's identity (JSON)."""
        return {**self._stream.state(), "first": self._first}


@dataclass(frozen=True)
class SourceUse:
    """Use of one source by a run, over all stages."""

    name: str
    tokens: int
    """Tokens of the source that the samples consume."""
    epochs: float
    """Passes through the source."""


@dataclass(frozen=True)
class Streams:
    """Sample streams of a run."""

    training: SampleStream
    validation: SampleStream | None
    """None: no evaluation."""
    uses: Sequence[SourceUse] = ()
    """One per source of the training stream; empty: synthetic samples."""
