"""Fill in the middle: move the middle of documents to the end, so causal models learn to infill.

Bavarian et al. 2022, "Efficient training of language models to fill in the middle" (arXiv
2207.14255), section 3, on tokens and inside a sample ("context-level"): each document, or the part
of it in the sample, is split at two uniformly drawn positions into prefix, middle and suffix.

    PSM   <prefix> prefix <suffix> suffix <middle> middle
    SPM   <prefix> <suffix> suffix <middle> prefix middle      (variant 2 of appendix D)
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moetron.common.errors import UserError
from moetron.data.addressing.windowing import Windowing
from moetron.data.objectives.objective import Made
from moetron.data.objectives.spans import draws

MARKERS = 3
"""Tokens added to a transformed document."""
TOKENS_PER_MARKER = 64
"""A sample reserves 1/64 of its tokens for markers (StarCoder's files: some 500 tokens)."""
CHANCE = 2.0**-64


@dataclass(frozen=True)
class FimOptions:
    """Rates and marker ids."""

    rate: float
    """Fraction of documents transformed."""
    spm_rate: float
    """Fraction of those in SPM format."""
    prefix: int
    middle: int
    suffix: int


class FillInTheMiddle:
    """Samples of S raw tokens less the room for markers; no raw token is skipped, all have loss.

    The first input is the end-of-document token. If more documents are drawn than there is room
    for, the later ones are not transformed; unused room is filled with the end token, without
    loss.
    """

    kinds: tuple[str, ...] = ("causal", "fim")

    def __init__(self, seq_length: int, end: int, options: FimOptions) -> None:
        """Raise UserError if the sample is too short for one document's markers."""
        self._end, self._options = end, options
        self._documents = max(1, seq_length // (TOKENS_PER_MARKER * MARKERS))
        room = seq_length - MARKERS * self._documents
        if room < MARKERS:
            raise UserError(f"fim: --seq-length {seq_length} has no room for three markers")
        self.windowing = Windowing((room,), overlap=0)

    def fill(self, raw: np.ndarray, slot: int, key: str, row: np.ndarray, mask: np.ndarray) -> Made:
        """Move the middle of some documents to their end; see ``Objective``."""
        starts = np.flatnonzero(raw == self._end)
        documents = np.split(raw.astype(np.int64), starts)  # each but the first begins with an end
        uniform = draws(key, 4 * len(documents)).reshape(-1, 4)
        parts: list[np.ndarray] = []
        moved = 0
        for document, chances in zip(documents, uniform, strict=True):
            leading = int(document.size > 0 and document[0] == self._end)
            parts.append(document[:leading])
            text = document[leading:]
            if moved < self._documents and text.size and self._drawn(chances[0]):
                parts += self._moved(text, chances[1:])
                moved += 1
            else:
                parts.append(text)
        filled = np.concatenate(parts)
        row[0] = self._end
        row[1 : 1 + filled.size] = filled
        row[1 + filled.size :] = self._end
        mask[filled.size :] = 0.0
        return Made(int(moved > 0))

    def state(self) -> dict[str, Any]:
        """Return the options."""
        return {"name": "fim", **asdict(self._options)}

    def _drawn(self, chance: np.uint64) -> bool:
        return float(chance) * CHANCE < self._options.rate

    def _moved(self, text: np.ndarray, chances: np.ndarray) -> list[np.ndarray]:
        """Return the parts of one document, its middle last."""
        first, last = sorted((chances[:2] % np.uint64(text.size + 1)).tolist())
        prefix, middle, suffix = np.split(text, [first, last])
        options = self._options
        markers = [np.array([i]) for i in (options.prefix, options.suffix, options.middle)]
        if float(chances[2]) * CHANCE < options.spm_rate:
            return [markers[0], markers[1], suffix, markers[2], prefix, middle]
        return [markers[0], prefix, markers[1], suffix, markers[2], middle]
