"""Predict every next token."""

from typing import Any

import numpy as np

from moetron.data.addressing.windowing import Cutting
from moetron.data.objectives.objective import Made


class Causal:
    """Windows of S + 1 tokens that overlap by one; loss everywhere."""

    kinds: tuple[str, ...] = ("causal",)

    def __init__(self, seq_length: int) -> None:
        self.cutting = Cutting((seq_length,), overlap=1)

    def fill(self, raw: np.ndarray, slot: int, key: str, row: np.ndarray, mask: np.ndarray) -> Made:
        """The raw tokens as they are; see ``Objective``."""
        row[:] = raw
        return Made(0)

    def state(self) -> dict[str, Any]:
        """Its name."""
        return {"name": "causal"}
