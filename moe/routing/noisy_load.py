"""Noisy top-k gating and its balance losses (Shazeer et al., arXiv 1701.06538, section 4, app. A).

T tokens, E experts, [T, E]: h = x W + e softplus(x V) with e from N(0, 1); the k largest h win.
"""

import torch


def cv_squared(totals_E: torch.Tensor) -> torch.Tensor:
    """Return the population variance over the squared mean, 0 when all are equal."""
    return totals_E.var(correction=0) / totals_E.mean().square().clamp(min=1e-10)


def win_probability(
    clean_TE: torch.Tensor, noisy_TE: torch.Tensor, spread_TE: torch.Tensor, topk: int
) -> torch.Tensor:
    """Return P(expert wins if only its own noise is redrawn); differentiable, its sum is the load.

    P = Phi((x W - the k-th largest of the other experts' h) / softplus(x V)). With k = E every
    expert wins.

    Args:
        clean_TE: x W.
        noisy_TE: h, as drawn.
        spread_TE: softplus(x V).
        topk: k.
    """
    if topk == noisy_TE.shape[1]:
        return torch.ones_like(clean_TE)
    best_Tk = noisy_TE.topk(topk + 1, dim=1).values
    enter_T1, stay_T1 = best_Tk[:, -2:-1], best_Tk[:, -1:]  # thresholds to get in, to stay in
    inside_TE = noisy_TE > stay_T1
    threshold_TE = torch.where(inside_TE, stay_T1, enter_T1)
    return torch.special.ndtr((clean_TE - threshold_TE) / spread_TE)
