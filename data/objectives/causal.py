"""Causal objective: predict every next token."""

from typing import Any

import numpy as np

from moetron.data.addressing.windowing import Windowing
from moetron.data.objectives.objective import Made


class Causal:
    """Windows of S + 1 tokens that overlap by one, with loss on every token."""

    kinds: tuple[str, ...] = ("causal",)

    def __init__(self, seq_length: int) -> None:
        self.windowing = Windowing((seq_length,), overlap=1)

    def fill(self, raw: np.ndarray, slot: int, key: str, row: np.ndarray, mask: np.ndarray) -> Made:
        """Copy the raw tokens; see ``Objective``."""
        row[:] = raw
        return Made(0)

    def state(self) -> dict[str, Any]:
        """Return the name."""
        return {"name": "causal"}
