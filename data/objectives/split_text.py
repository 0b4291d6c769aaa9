"""Prefix language modelling of an encoder-decoder: the second part of a text from the first."""

from typing import Any

import numpy as np

from moetron.common.errors import UserError
from moetron.data.addressing.windowing import Windowing
from moetron.data.objectives.objective import Made
from moetron.data.objectives.spans import draws


class SplitText:
    """Texts split at a uniformly drawn position (Raffel et al. 2020, section 3.2.1).

    The encoder reads the first part and an end, the decoder predicts the second part and an end.
    Both are padded: a text has as many raw tokens as the encoder's part of a sample, and the
    position is one at which both parts fit.
    """

    kinds: tuple[str, ...] = ("prefix_lm",)

    def __init__(self, seq_length: int, encoder_length: int, end: int, start: int) -> None:
        """Raise UserError if a part has no room for a token and its end."""
        self._decoder = seq_length - encoder_length
        if min(encoder_length, self._decoder) < 2:
            raise UserError(
                f"prefix_lm: --encoder-seq-length {encoder_length} of --seq-length {seq_length} "
                "leaves no room for a token and its end; give each part at least 2"
            )
        self._encoder, self._end, self._start = encoder_length, end, start
        self.windowing = Windowing((encoder_length,), overlap=0)

    def fill(self, raw: np.ndarray, slot: int, key: str, row: np.ndarray, mask: np.ndarray) -> Made:
        """Split the raw tokens; see ``Objective``."""
        least = max(1, raw.size - self._decoder + 1)
        split = least + int(draws(key, 1)[0] % np.uint64(raw.size - least))
        inputs, targets = np.append(raw[:split], self._end), np.append(raw[split:], self._end)
        row[:] = self._start
        row[: inputs.size] = inputs
        row[self._encoder + 1 : self._encoder + 1 + targets.size] = targets
        segments = np.zeros(mask.size, np.int64)
        segments[: inputs.size] = 1
        segments[self._encoder : self._encoder + targets.size] = 1
        mask[:] = segments
        mask[: self._encoder] = 0.0
        return Made(0, segments=segments)

    def state(self) -> dict[str, Any]:
        """Return the name and the encoder's part."""
        return {"name": "prefix_lm", "encoder_length": self._encoder}
