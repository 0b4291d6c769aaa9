"""Weights of chosen experts with gradients other than a softmax's. T tokens, E experts, [T, E]."""

import math

import torch


def top_choices(scores_TE: torch.Tensor, topk: int) -> torch.Tensor:
    """Return the mask of the ``topk`` highest scores of each row: bool [T, E]."""
    best_Tk = scores_TE.topk(topk, dim=1).indices
    return torch.zeros_like(scores_TE, dtype=torch.bool).scatter(1, best_Tk, True)


def straight_through(probs_TE: torch.Tensor, topk: int) -> torch.Tensor:
    """Return 1 / k with the gradient of the probability.

    Bengio et al. (arXiv 1308.3432, section 4). The output ignores the router's confidence.
    """
    return 1 / topk + (probs_TE - probs_TE.detach())  # the difference first: exactly 0


def annealed(start: float, end: float, done: float) -> float:
    """Return the temperature at the fraction ``done`` of a geometric decay from start to end."""
    return start * math.exp(min(done, 1.0) * math.log(end / start))


def relaxed_topk(logits_TE: torch.Tensor, topk: int, temperature: float) -> torch.Tensor:
    """Return weights in (0, 1): sigmoid((x_i - v) / t), with v such that they sum to k.

    They maximise x . w + t H_b(w) for 0 <= w <= 1 and sum w = k, a relaxation of the top-k mask
    (Amos et al., LML layer, arXiv 1906.08707, section 3). The gradient is exact: v moves with x.
    """
    x_TE = logits_TE / temperature
    fixed_TE = x_TE.detach()
    # At the lower bound all weights are above k / E, at the upper bound all are below.
    shift = math.log(topk / (x_TE.shape[1] - topk)) if topk < x_TE.shape[1] else math.inf
    if math.isinf(shift):
        return torch.ones_like(x_TE) + 0 * x_TE
    low_T1 = fixed_TE.amin(1, keepdim=True) - shift
    high_T1 = fixed_TE.amax(1, keepdim=True) - shift
    for _ in range(60 if x_TE.dtype == torch.float64 else 30):
        middle_T1 = (low_T1 + high_T1) / 2
        too_much_T1 = (fixed_TE - middle_T1).sigmoid().sum(1, keepdim=True) > topk
        low_T1 = torch.where(too_much_T1, middle_T1, low_T1)
        high_T1 = torch.where(too_much_T1, high_T1, middle_T1)
    weights_TE = (fixed_TE - high_T1).sigmoid()
    slope_TE = weights_TE * (1 - weights_TE)
    share_TE = slope_TE / slope_TE.sum(1, keepdim=True)
    move_T1 = (share_TE * (x_TE - fixed_TE)).sum(1, keepdim=True)  # dv = sum_i share_i dx_i
    return (x_TE - high_T1 - move_T1).sigmoid()
