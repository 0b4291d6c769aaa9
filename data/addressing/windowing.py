"""How a source's tokens are cut into samples: arithmetic on a repeating pattern."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Cutting:
    """Samples one after the other, their lengths a cycle of slots.

    Sample i uses up ``advances[i mod slots]`` tokens and reads ``overlap`` more, which the next one
    reads again. So every token but a tail shorter than one sample is used exactly once, however the
    samples differ in length.
    """

    advances: tuple[int, ...]
    overlap: int

    @property
    def mean_advance(self) -> float:
        """Tokens that a sample uses up, on average."""
        return sum(self.advances) / len(self.advances)

    def count(self, tokens: int) -> int:
        """Samples that so many tokens give."""
        cycles, rest = divmod(max(0, tokens - self.overlap), sum(self.advances))
        in_rest = np.searchsorted(np.cumsum(self.advances), rest, side="right")
        return cycles * len(self.advances) + int(in_rest)

    def place(self, number: int) -> tuple[int, int, int]:
        """(slot, first token, end) of one sample."""
        cycle, slot = divmod(number, len(self.advances))
        start = cycle * sum(self.advances) + sum(self.advances[:slot])
        return slot, start, start + self.advances[slot] + self.overlap
