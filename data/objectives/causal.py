"""Predict every next token."""

from typing import Any

import numpy as np

from moetron.data.cutting import Cutting


class Causal:
    """Windows of S + 1 tokens that overlap by one; loss everywhere."""

    def __init__(self, seq_length: int) -> None:
        self.cutting = Cutting((seq_length,), overlap=1)

    def fill(self, raw: np.ndarray, slot: int, key: str, row: np.ndarray, mask: np.ndarray) -> None:
        """The raw tokens as they are; see ``Objective``."""
        row[:] = raw

    def state(self) -> dict[str, Any]:
        """Its name."""
        return {"name": "causal"}
