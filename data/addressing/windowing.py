"""Division of a source's tokens into samples of a repeating pattern of lengths."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Windowing:
    """Consecutive samples whose lengths repeat in a cycle of slots.

    Sample i advances by ``advances[i mod slots]`` tokens and reads ``overlap`` more, which the next
    one reads again. Every token except a tail shorter than one sample is used exactly once, also
    when samples differ in length.
    """

    advances: tuple[int, ...]
    overlap: int

    @property
    def mean_advance(self) -> float:
        """Return the mean number of tokens that a sample advances by."""
        return sum(self.advances) / len(self.advances)

    def count(self, tokens: int) -> int:
        """Return the number of samples in ``tokens`` tokens."""
        cycles, rest = divmod(max(0, tokens - self.overlap), sum(self.advances))
        in_rest = np.searchsorted(np.cumsum(self.advances), rest, side="right")
        return cycles * len(self.advances) + int(in_rest)

    def place(self, number: int) -> tuple[int, int, int]:
        """Return (slot, first token, end) of one sample."""
        cycle, slot = divmod(number, len(self.advances))
        start = cycle * sum(self.advances) + sum(self.advances[:slot])
        return slot, start, start + self.advances[slot] + self.overlap
