"""Router saturation: how much of the final routing a checkpoint has (OLMoE, section 5.1)."""

import numpy as np

from moetron.moe.analysis.routing_trace import chosen


def saturation(
    ranked_LTK: np.ndarray, final_LTK: np.ndarray, num_experts: int, top: int
) -> np.ndarray:
    """Share of a token's final experts that it chose at this checkpoint already.

    (1/N) sum_n |S_n intersect F_n| / |F_n|, with S_n and F_n the best ``top`` experts of token n at
    this checkpoint and at the final one. 1 where both route alike, ``top`` / E by chance.

    Args:
        ranked_LTK: choices at the checkpoint, best first: int [L, T, K], -1 for none.
        final_LTK: choices of the same tokens at the final checkpoint.
        num_experts: E.
        top: experts of a token to compare; 1 to K.

    Returns:
        float64 [L].
    """
    now = chosen(ranked_LTK[:, :, :top], num_experts)
    final = chosen(final_LTK[:, :, :top], num_experts)
    common_LT = (now & final).sum(2)
    return (common_LT / np.maximum(final.sum(2), 1)).mean(1)
