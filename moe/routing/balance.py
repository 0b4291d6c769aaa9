"""Balance losses and z-loss of routers, as this rank's part of the loss of a micro-batch.

Nothing here communicates: the caller (router.py) all-reduces counts over the ranks that hold the
micro-batch, and the parts of these ranks add up to the loss.

Shape suffixes: T tokens of this rank, s of them per group, G groups, E experts. A group is a
sequence, or all tokens of the micro-batch (G = 1). Counts are int64: exact in any model dtype and
for any number of tokens.
"""

import torch

BALANCE_LOSSES = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
    "noisy_load": "noisy_load_loss",
}
"""--moe-router-load-balancing-type -> name of its sums in losses.py (megatron-core's name)."""


def choice_shares(counts_GE: torch.Tensor) -> torch.Tensor:
    """Return f, the fraction of a group's choices per expert: float64 [G, E], 0 if it is empty."""
    return counts_GE.double() / counts_GE.sum(-1, keepdim=True).clamp(min=1)


def balance_part(
    shares_GE: torch.Tensor, scores_sGE: torch.Tensor, tokens_G: torch.Tensor | int
) -> torch.Tensor:
    r"""Return this rank's part of :math:`\frac{1}{G'} \sum_g E \sum_i f_{gi} P_{gi}`; parts add up.

    :math:`P_{gi}` is the mean score of expert i over the tokens of group g on all ranks, G' the
    number of groups with tokens. Even routing gives 1 for any k. Switch Transformer (arXiv
    2101.03961, equations 4 to 6), with f over all k choices; by sequence DeepSeek-V3's
    sequence-wise loss (arXiv 2412.19437, equations 17 to 20).

    Args:
        shares_GE: f.
        scores_sGE: fp32 or fp64, sum to 1 over experts, 0 for padding; differentiable.
        tokens_G: int64, tokens of each group over all ranks, without padding; a number if all
            groups have equally many.

    Returns:
        A scalar in the dtype of the scores.
    """
    experts = shares_GE.shape[-1]
    if isinstance(tokens_G, int):
        weights_GE = shares_GE * experts / (tokens_G * len(shares_GE))
    else:
        groups = (tokens_G > 0).sum().clamp(min=1)
        weights_GE = shares_GE * experts / (tokens_G.clamp(min=1)[:, None] * groups)
    return (weights_GE.to(scores_sGE.dtype) * scores_sGE.sum(0)).sum()


def z_part(
    logits_TE: torch.Tensor, is_padding_T: torch.Tensor | None, tokens: torch.Tensor | int
) -> torch.Tensor:
    r"""Return this rank's part of :math:`\frac{1}{N} \sum_t (\log \sum_j e^{x_{tj}})^2`.

    The router z-loss of ST-MoE (arXiv 2202.08906, equation 5), in fp32 or fp64. Parts add up.

    Args:
        logits_TE: x, differentiable.
        is_padding_T: tokens to exclude.
        tokens: N, over all ranks, without padding.
    """
    wide_TE = logits_TE if logits_TE.dtype == torch.float64 else logits_TE.float()
    squares_T = wide_TE.logsumexp(-1).square()
    if is_padding_T is not None:
        squares_T = squares_T.masked_fill(is_padding_T, 0)
    return squares_T.sum() / (tokens.clamp(min=1) if isinstance(tokens, torch.Tensor) else tokens)
