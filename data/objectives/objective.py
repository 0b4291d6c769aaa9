"""Interface of training objectives."""

from typing import Any, NamedTuple, Protocol

import numpy as np

from moetron.data.addressing.windowing import Windowing


class Made(NamedTuple):
    """Result of filling a sample."""

    kind: int
    """Index in the objective's ``kinds``."""
    prefix: int = 0
    """Number of leading tokens without loss that may attend to each other; 0: none."""
    segments: np.ndarray | None = None
    """Example of each token of an encoder-decoder's sample, int64 [S], 0: padding; None: there is
    one example, without padding."""


class Objective(Protocol):
    """Rule that makes a sample of S tokens from consecutive tokens of a source."""

    windowing: Windowing
    """Raw tokens of each sample."""
    kinds: tuple[str, ...]
    """Kinds of samples that it makes, for the losses in the log."""

    def fill(self, raw: np.ndarray, slot: int, key: str, row: np.ndarray, mask: np.ndarray) -> Made:
        """Fill one sample in place.

        Args:
            raw: Tokens of the source, integers [advances[slot] + overlap].
            slot: Slot in the windowing's cycle.
            key: Key of the sample; all random choices must follow from it.
            row: int64 [S + 1]: the model sees ``row[:-1]`` and predicts ``row[1:]``.
            mask: float32 [S], ones: set to 0 where ``row[1:]`` has no loss.
        """
        ...

    def state(self) -> dict[str, Any]:
        """Return what identifies the objective (JSON)."""
        ...
