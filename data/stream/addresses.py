"""Where sample n lies: arithmetic from a number to (source, window)."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from moetron.data.addressing.apportionment import Apportionment
from moetron.data.addressing.permutation import Permutation
from moetron.data.stream.blend import Blend

ENDLESS = 1 << 62


class Addresses(Protocol):
    """The order of a stream's samples."""

    def __len__(self) -> int:
        """Samples that have an address."""
        ...

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source int64 [N], window int64 [N]) of sample numbers int64 [N]."""
        ...

    def state(self) -> dict[str, Any]:
        """What identifies the order (JSON)."""
        ...


class ShuffledAddresses:
    """Sources interleaved by weight, each going through its windows in a new shuffle every epoch.

    A source's order depends on the seed, its number and its count of windows alone: the weights
    only decide when its next window comes.
    """

    def __init__(
        self,
        blend: Blend,
        seed: int,
        numbers: Sequence[int] | None = None,
        begun: Sequence[int] | None = None,
    ) -> None:
        """Begin a blend, or go on with sources that another blend of the same seed has begun.

        Args:
            blend: Sources and weights.
            seed: Of all orders.
            numbers: What tells each source's order from another's; default: its place in the blend.
            begun: Windows that each source has given before; default: none.
        """
        self.seed = seed
        self.apportionment = Apportionment(blend.weights)
        self.windows = [source.windows for source in blend.sources]
        self.numbers = list(range(len(self.windows)) if numbers is None else numbers)
        self.begun = list([0] * len(self.windows) if begun is None else begun)

    def __len__(self) -> int:
        """A shuffled blend repeats without end."""
        return ENDLESS

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source int64 [N], window int64 [N]) of sample numbers int64 [N]."""
        sources, ranks = self.apportionment.locate(samples)
        windows = np.empty_like(ranks)
        for source in np.unique(sources).tolist():
            mine = np.flatnonzero(sources == source)
            epochs, positions = np.divmod(ranks[mine] + self.begun[source], self.windows[source])
            for epoch in np.unique(epochs).tolist():
                now = epochs == epoch
                windows[mine[now]] = self._order(source, epoch)(positions[now])
        return sources, windows

    def epochs(self, samples: int) -> list[float]:
        """How often each source has been passed through after so many samples of the blend."""
        counts = self.apportionment.counts(samples)
        return [count / windows for count, windows in zip(counts, self.windows, strict=True)]

    def state(self) -> dict[str, Any]:
        """Seed, weights, windows, and how the sources were begun."""
        return {
            "seed": self.seed,
            "weights": self.apportionment.weights,
            "windows": self.windows,
            "numbers": self.numbers,
            "begun": self.begun,
        }

    def _order(self, source: int, epoch: int) -> Permutation:
        """The order of a source's windows in one epoch."""
        return _permutation(
            self.windows[source], f"seed {self.seed} source {self.numbers[source]} epoch {epoch}"
        )


class FileOrderAddresses:
    """Every window once, in file order, one source after the other."""

    def __init__(self, blend: Blend) -> None:
        self.windows = [source.windows for source in blend.sources]
        self._ends = np.cumsum(self.windows)

    def __len__(self) -> int:
        """Windows of all sources."""
        return int(self._ends[-1])

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source int64 [N], window int64 [N]) of sample numbers int64 [N]."""
        sources = np.searchsorted(self._ends, samples, side="right")
        return sources, samples - (self._ends - self.windows)[sources]

    def state(self) -> dict[str, Any]:
        """Windows of each source."""
        return {"windows": self.windows}


@lru_cache(maxsize=256)
def _permutation(size: int, key: str) -> Permutation:
    """A permutation; the current ones of a blend stay at hand."""
    return Permutation(size, key)
