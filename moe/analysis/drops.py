"""Dropped choices by position in the sequence (OpenMoE: drops grow towards the end)."""

import numpy as np

from moetron.moe.analysis.routing_trace import Routed


class Drops:
    """Counts choices and dropped choices at each position of a window."""

    def __init__(self, layers: int, seq_length: int) -> None:
        self._chosen = np.zeros((layers, seq_length), dtype=np.int64)
        self._dropped = np.zeros((layers, seq_length), dtype=np.int64)

    def add(self, routed: Routed) -> None:
        """Count whole windows, one after the other."""
        layers, length = self._chosen.shape
        chosen_LTE = routed.chosen_LTE()
        dropped_LTE = chosen_LTE & ~routed.kept_LTE
        self._chosen += chosen_LTE.sum(2).reshape(layers, -1, length).sum(1)
        self._dropped += dropped_LTE.sum(2).reshape(layers, -1, length).sum(1)

    def fractions(self, buckets: int = 16) -> np.ndarray:
        """dropped(p) / count(p) over equal stretches of the window, float64 [L, buckets]."""
        chosen = [part.sum(1) for part in np.array_split(self._chosen, buckets, axis=1)]
        dropped = [part.sum(1) for part in np.array_split(self._dropped, buckets, axis=1)]
        return np.stack(dropped, 1) / np.maximum(np.stack(chosen, 1), 1)
