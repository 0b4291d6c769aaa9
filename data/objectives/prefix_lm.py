"""Prefix language modelling: predict the second part of a text, given the first."""

from typing import Any

import numpy as np

from moetron.common.errors import UserError
from moetron.data.addressing.windowing import Windowing
from moetron.data.objectives.objective import Made
from moetron.data.objectives.spans import draws


class PrefixLM:
    """Windows of ``Causal`` split at a uniformly drawn position, with loss only after it.

    Raffel et al. 2020 (T5), section 3.2.1. Tokens are unchanged: no end token, no mode prefix.
    """

    kinds: tuple[str, ...] = ("prefix_lm",)

    def __init__(self, seq_length: int) -> None:
        """Raise UserError if a sample has no room for a prefix and a target."""
        if seq_length < 2:
            raise UserError(f"prefix_lm: --seq-length {seq_length} is too short; give at least 2")
        self.windowing = Windowing((seq_length,), overlap=1)

    def fill(self, raw: np.ndarray, slot: int, key: str, row: np.ndarray, mask: np.ndarray) -> Made:
        """Mask the loss of the prefix; see ``Objective``."""
        row[:] = raw
        prefix = 1 + int(draws(key, 1)[0] % np.uint64(mask.size - 1))
        mask[: prefix - 1] = 0.0  # the prefix's last token predicts the first target
        return Made(0, prefix)

    def state(self) -> dict[str, Any]:
        """Return the name."""
        return {"name": "prefix_lm"}
