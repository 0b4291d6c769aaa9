"""Routing statistics: saturation, co-activation, drops, similarity of experts.

L layers, T tokens, E experts, K the largest number of experts of a token, as in `routing_trace`.
"""

import numpy as np

from moetron.moe.analysis.routing_trace import Routed, chosen


def saturation(
    ranked_LTK: np.ndarray, final_LTK: np.ndarray, num_experts: int, top: int
) -> np.ndarray:
    """Return router saturation (OLMoE, section 5.1): share of the final experts already chosen.

    (1/N) sum_n |S_n intersect F_n| / |F_n|, with S_n and F_n the best ``top`` experts of token n at
    this checkpoint and at the final one. 1 for identical routing, ``top`` / E by chance.

    Args:
        ranked_LTK: choices at the checkpoint, best first: int [L, T, K], -1 for none.
        final_LTK: choices of the same tokens at the final checkpoint.
        num_experts: E.
        top: experts per token to compare, 1 to K.

    Returns:
        float64 [L].
    """
    now = chosen(ranked_LTK[:, :, :top], num_experts)
    final = chosen(final_LTK[:, :, :top], num_experts)
    common_LT = (now & final).sum(2)
    return (common_LT / np.maximum(final.sum(2), 1)).mean(1)


class CoActivation:
    """Expert co-activation (OLMoE, section 5.2): pairs of experts chosen by the same token.

    N(Ei, Ej) / N(Ei), over all pairs of a token's k choices, as in OLMoE's equation. With
    ``adjacent``, only pairs of neighbouring ranks count, as in the code released with the paper:
    k - 1 of the k (k - 1) / 2 pairs.
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
        """Return N(Ei, Ej) / N(Ei), float64 [L, E, E]; 0 on the diagonal and for unused Ei."""
        ratio = self._pairs / np.maximum(self._tokens, 1)[:, :, None]
        ratio[:, np.arange(ratio.shape[1]), np.arange(ratio.shape[1])] = 0.0
        return ratio


class Drops:
    """Choices and dropped choices by position (OpenMoE: drops grow towards the end)."""

    def __init__(self, layers: int, seq_length: int) -> None:
        self._chosen = np.zeros((layers, seq_length), dtype=np.int64)
        self._dropped = np.zeros((layers, seq_length), dtype=np.int64)

    def add(self, routed: Routed) -> None:
        """Count complete windows, in order."""
        layers, length = self._chosen.shape
        chosen_LTE = routed.chosen_LTE()
        dropped_LTE = chosen_LTE & ~routed.kept_LTE
        self._chosen += chosen_LTE.sum(2).reshape(layers, -1, length).sum(1)
        self._dropped += dropped_LTE.sum(2).reshape(layers, -1, length).sum(1)

    def fractions(self, buckets: int = 16) -> np.ndarray:
        """Return dropped(p) / count(p) over equal parts of the window, float64 [L, buckets]."""
        chosen = [part.sum(1) for part in np.array_split(self._chosen, buckets, axis=1)]
        dropped = [part.sum(1) for part in np.array_split(self._dropped, buckets, axis=1)]
        return np.stack(dropped, 1) / np.maximum(np.stack(chosen, 1), 1)


def cosines(rows_EN: np.ndarray) -> np.ndarray:
    """Return the cosine of every pair of rows, float64 [E, E]; 0 for zero rows."""
    rows = rows_EN.astype(np.float64)
    norms = np.linalg.norm(rows, axis=1)
    unit = rows / np.where(norms > 0, norms, 1.0)[:, None]
    return unit @ unit.T


def mean_similarity(rows_EN: np.ndarray) -> float:
    """Return the mean cosine over pairs of different rows: 1 for copies, about 0 for random."""
    matrix = cosines(rows_EN)
    experts = len(matrix)
    return float((matrix.sum() - np.trace(matrix)) / max(experts * (experts - 1), 1))
