"""Predict the second part of a text, given the first."""

from typing import Any

import numpy as np

from moetron.common.errors import UserError
from moetron.data.addressing.windowing import Cutting
from moetron.data.objectives.objective import Made
from moetron.data.objectives.spans import draws


class PrefixLM:
    """Windows as ``Causal`` cuts them, split at a uniformly drawn place; loss after it alone.

    Raffel et al. 2020 (T5), section 3.2.1. Windows keep the tokens as they are: no end, no mode.
    """

    kinds: tuple[str, ...] = ("prefix_lm",)

    def __init__(self, seq_length: int) -> None:
        """Raises UserError where a sample has no room for a prefix and a target."""
        if seq_length < 2:
            raise UserError(f"prefix_lm: --seq-length {seq_length} is too short; give at least 2")
        self.cutting = Cutting((seq_length,), overlap=1)

    def fill(self, raw: np.ndarray, slot: int, key: str, row: np.ndarray, mask: np.ndarray) -> Made:
        """Mask the loss of the prefix; see ``Objective``."""
        row[:] = raw
        prefix = 1 + int(draws(key, 1)[0] % np.uint64(mask.size - 1))
        mask[: prefix - 1] = 0.0  # the prefix's last token predicts the first target
        return Made(0, prefix)

    def state(self) -> dict[str, Any]:
        """Its name."""
        return {"name": "prefix_lm"}
