"""Documents inside samples: lengths, for attention that does not cross their ends."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np


class Samples(Protocol):
    """Numbered samples, of any stream of this package."""

    source_names: list[str]
    objective_names: list[str]

    @property
    def bytes_per_token(self) -> list[float | None]:
        """Return the mean of each source's text."""
        ...

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def __getitem__(self, n: int) -> Mapping[str, Any]:
        """Return sample ``n``."""
        ...

    def state(self) -> dict[str, Any]:
        """Return the identity."""
        ...


def document_lengths(tokens: np.ndarray, eod: int) -> np.ndarray:
    """Return the lengths of the documents in ``tokens`` [S]: int64, they add up to S.

    A document ends with its end-of-document token (Megatron's rule); the first may have begun, and
    the last may end, outside the sample.
    """
    ends = np.flatnonzero(tokens[:-1] == eod) + 1
    return np.diff(ends, prepend=0, append=tokens.size)


class DocumentStream:
    """Samples of another stream with the lengths of their ``documents``."""

    def __init__(self, stream: Samples, eod: int) -> None:
        """Take a stream whose documents end with the token ``eod``."""
        self.source_names = stream.source_names
        self.objective_names = stream.objective_names
        self.bytes_per_token = stream.bytes_per_token
        self._stream, self._eod = stream, eod

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._stream)

    def __getitem__(self, n: int) -> dict[str, Any]:
        """Return sample ``n``."""
        sample = self._stream[n]
        return {**sample, "documents": document_lengths(sample["tokens"], self._eod)}

    def state(self) -> dict[str, Any]:
        """Return the other stream's identity: tokens are the same."""
        return self._stream.state()
