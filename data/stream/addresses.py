"""Addresses of samples: from a sample number to (source, window)."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from moetron.data.addressing.apportionment import Apportionment
from moetron.data.addressing.permutation import Permutation
from moetron.data.stream.blend import Blend

ENDLESS = 1 << 62


class Addresses(Protocol):
    """Order of a stream's samples."""

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (source int64 [N], window int64 [N]) of sample numbers int64 [N]."""
        ...

    def state(self) -> dict[str, Any]:
        """Return what identifies the order (JSON)."""
        ...


class ShuffledAddresses:
    """Sources interleaved by weight; each source's windows are reshuffled every epoch.

    A source's order depends only on the seed, its number and its window count; the weights only
    decide when its next window is drawn.
    """

    def __init__(
        self,
        blend: Blend,
        seed: int,
        numbers: Sequence[int] | None = None,
        drawn: Sequence[int] | None = None,
    ) -> None:
        """Start a blend, or continue sources that another blend of the same seed has started.

        Args:
            blend: Sources and weights.
            seed: Seed of all orders.
            numbers: Number of each source in the key of its order; default: its index in the blend.
            drawn: Windows already drawn from each source; default: none.
        """
        self.seed = seed
        self.apportionment = Apportionment(blend.weights)
        self.windows = [source.windows for source in blend.sources]
        self.numbers = list(range(len(self.windows)) if numbers is None else numbers)
        self.drawn = list([0] * len(self.windows) if drawn is None else drawn)

    def __len__(self) -> int:
        """Return ``ENDLESS``: a shuffled blend repeats without end."""
        return ENDLESS

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (source int64 [N], window int64 [N]) of sample numbers int64 [N]."""
        sources, ranks = self.apportionment.locate(samples)
        windows = np.empty_like(ranks)
        for source in np.unique(sources).tolist():
            mine = np.flatnonzero(sources == source)
            epochs, positions = np.divmod(ranks[mine] + self.drawn[source], self.windows[source])
            for epoch in np.unique(epochs).tolist():
                now = epochs == epoch
                windows[mine[now]] = self._order(source, epoch)(positions[now])
        return sources, windows

    def epochs(self, samples: int) -> list[float]:
        """Return the epochs of each source after ``samples`` samples of the blend."""
        counts = self.apportionment.counts(samples)
        return [count / windows for count, windows in zip(counts, self.windows, strict=True)]

    def state(self) -> dict[str, Any]:
        """Return seed, weights, windows, source numbers and windows drawn before."""
        return {
            "seed": self.seed,
            "weights": self.apportionment.weights,
            "windows": self.windows,
            "numbers": self.numbers,
            "begun": self.drawn,
        }

    def _order(self, source: int, epoch: int) -> Permutation:
        """Return the order of a source's windows in one epoch."""
        return _permutation(
            self.windows[source], f"seed {self.seed} source {self.numbers[source]} epoch {epoch}"
        )


class FileOrderAddresses:
    """Every window once, or some at equal distances, in file order, source by source."""

    def __init__(self, blend: Blend, at_most: int | None = None) -> None:
        """Take all windows, or ``at_most``: of each source a part in proportion to its windows."""
        self.windows = [source.windows for source in blend.sources]
        self._ends = np.cumsum(self.windows)
        self._all = int(self._ends[-1])
        self._count = self._all if at_most is None else min(at_most, self._all)

    def __len__(self) -> int:
        """Return the number of windows taken."""
        return self._count

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (source int64 [N], window int64 [N]) of sample numbers int64 [N]."""
        windows = samples * self._all // self._count
        sources = np.searchsorted(self._ends, windows, side="right")
        return sources, windows - (self._ends - self.windows)[sources]

    def state(self) -> dict[str, Any]:
        """Return the window counts of all sources, and the number of windows taken."""
        return {"windows": self.windows, "taken": self._count}


@lru_cache(maxsize=256)
def _permutation(size: int, key: str) -> Permutation:
    """Return a permutation; cached, because a blend uses few at a time."""
    return Permutation(size, key)
