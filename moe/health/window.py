"""Statistics over the last values of a metric."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

LEAST_DEVIATION = 1e-10
"""Below this standard deviation the window is constant and nothing is a spike (OLMo-core)."""


@dataclass(frozen=True)
class Comparison:
    """A value compared with the window before it."""

    mean: float
    deviations: float
    """(value - mean) / standard deviation."""


class Window:
    """The last ``length`` values; the statistics apply from half of them on.

    As OLMo-core's SkipStepOptimizer (128 values, 6 deviations, from 64 values): the window excludes
    the value that is judged, the deviation is Bessel-corrected, and spikes enter the window, so
    that a new level becomes the normal one. Values that are not finite do not enter.

    Args:
        length: of the window.
        threshold: deviations above the mean that make a spike.
        ratio: a spike is also above this multiple of the mean.
    """

    def __init__(self, length: int, threshold: float, ratio: float = 0.0) -> None:
        self._values: deque[float] = deque(maxlen=length)
        self._threshold, self._ratio, self._least = threshold, ratio, length // 2

    def compare(self, value: float) -> Comparison | None:
        """Compare a value with the window; None: too few or constant values before it."""
        count = len(self._values)
        if count < self._least or not math.isfinite(value):
            return None
        mean = math.fsum(self._values) / count
        squares = math.fsum((each - mean) ** 2 for each in self._values)
        deviation = math.sqrt(squares / (count - 1))
        if deviation < LEAST_DEVIATION:
            return None
        return Comparison(mean, (value - mean) / deviation)

    def is_spike(self, value: float, found: Comparison | None) -> bool:
        """Return whether a value that compares as ``found`` is a spike."""
        if found is None:
            return False
        return found.deviations > self._threshold and value > self._ratio * found.mean

    def add(self, value: float) -> None:
        """Append a value, if it is finite."""
        if math.isfinite(value):
            self._values.append(value)

    def state(self) -> list[float]:
        """Return the values, oldest first."""
        return list(self._values)

    def restore(self, values: Sequence[float]) -> None:
        """Replace the values by those of an earlier `state`; the last of them, if too many."""
        self._values.clear()
        self._values.extend(values)
