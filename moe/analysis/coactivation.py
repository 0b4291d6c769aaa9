"""Expert co-activation: which experts serve the same tokens (OLMoE, section 5.2)."""

import numpy as np

from moetron.moe.analysis.routing_trace import Routed, chosen


class CoActivation:
    """Counts pairs of experts that a token chose together.

    N(Ei, Ej) / N(Ei), over all pairs of a token's k choices as OLMoE's equation says. With
    ``adjacent`` only pairs of neighbouring ranks count, as in the analysis code that was released
    with the paper: of k (k - 1) / 2 pairs it sees k - 1.
    """

    def __init__(self, layers: int, experts: int, adjacent: bool = False) -> None:
        self._adjacent = adjacent
        self._pairs = np.zeros((layers, experts, experts), dtype=np.int64)
        self._tokens = np.zeros((layers, experts), dtype=np.int64)

    def add(self, routed: Routed) -> None:
        """Count the tokens of ``routed``."""
        chosen_LTE = routed.chosen_LTE().astype(np.float32)  # exact: counts stay below 2^24
        self._tokens += chosen_LTE.sum(1).astype(np.int64)
        if not self._adjacent:
            self._pairs += np.matmul(chosen_LTE.transpose(0, 2, 1), chosen_LTE).astype(np.int64)
            return
        ranked, experts = routed.ranked_LTK, chosen_LTE.shape[2]
        for rank in range(ranked.shape[2] - 1):
            left = chosen(ranked[:, :, rank : rank + 1], experts).astype(np.float32)
            right = chosen(ranked[:, :, rank + 1 : rank + 2], experts).astype(np.float32)
            pairs = np.matmul(left.transpose(0, 2, 1), right).astype(np.int64)
            self._pairs += pairs + pairs.transpose(0, 2, 1)

    def matrix(self) -> np.ndarray:
        """N(Ei, Ej) / N(Ei), float64 [L, E, E] with 0 on the diagonal and where Ei saw nothing."""
        ratio = self._pairs / np.maximum(self._tokens, 1)[:, :, None]
        ratio[:, np.arange(ratio.shape[1]), np.arange(ratio.shape[1])] = 0.0
        return ratio
