"""What turns raw tokens into a sample."""

from typing import Any, NamedTuple, Protocol

import numpy as np

from moetron.data.addressing.windowing import Cutting


class Made(NamedTuple):
    """What a sample became."""

    kind: int
    """Number in the objective's ``kinds``."""
    prefix: int = 0
    """How many of the first tokens are given, without loss, and may see each other; 0: none."""


class Objective(Protocol):
    """A rule from a stretch of a source to a sample of S tokens."""

    cutting: Cutting
    """How many raw tokens each sample takes."""
    kinds: tuple[str, ...]
    """Names of the sorts of samples that it makes, for the losses in the log."""

    def fill(self, raw: np.ndarray, slot: int, key: str, row: np.ndarray, mask: np.ndarray) -> Made:
        """Make one sample in place.

        Args:
            raw: Tokens of the source, integers [advances[slot] + overlap].
            slot: Place in the cutting's cycle.
            key: Names the sample; all that is random must follow from it.
            row: int64 [S + 1]: the model sees ``row[:-1]`` and predicts ``row[1:]``.
            mask: float32 [S], ones: set to 0 where ``row[1:]`` bears no loss.
        """
        ...

    def state(self) -> dict[str, Any]:
        """What identifies the objective (JSON)."""
        ...
