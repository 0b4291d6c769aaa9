"""Router trained by REINFORCE: the reward of a choice is the token's negative loss.

Shape suffixes: T tokens of this rank, E experts, k = topk; b samples, s positions.
"""

from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch.distributed import ProcessGroup

from moetron.moe.routing.gradient_estimators import top_choices
from moetron.moe.routing.router import Router


def log_probability(logits_TE: torch.Tensor, order_Tk: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of sampling the experts ``order_Tk`` in order: [T].

    Sampling is without replacement. The Plackett-Luce model, sum over j of x_j - log sum exp of the
    remaining logits; the k largest of logits + Gumbel noise follow it (Kool et al., arXiv
    1903.06059, section 2).
    """
    total_T = torch.zeros_like(logits_TE[:, 0])
    left_TE = logits_TE
    for place_T1 in order_Tk.split(1, dim=1):
        total_T = total_T + (logits_TE.gather(1, place_T1) - _log_sum_exp(left_TE)).squeeze(1)
        left_TE = left_TE.scatter(1, place_T1, -torch.inf)
    return total_T


def _log_sum_exp(x_TE: torch.Tensor) -> torch.Tensor:
    return x_TE.logsumexp(1, keepdim=True)


def advantages(
    losses_bs: torch.Tensor, mask_bs: torch.Tensor, cp_group: ProcessGroup, per_token: bool
) -> torch.Tensor:
    """Return m_t (l_t - mean of the other tokens' losses), [b, s], the factor of log P.

    Collective over ``cp_group``. A baseline without the token itself does not bias the estimate
    (Williams 1992, section 4; Kool et al. 2019, "Buy 4 REINFORCE samples").

    Args:
        losses_bs: l, this context rank's part of a micro-batch.
        mask_bs: m, 1 for loss tokens.
        cp_group: ranks that hold the micro-batch's positions.
        per_token: losses are summed; otherwise averaged over the micro-batch's loss tokens.
    """
    sums = torch.stack([(losses_bs * mask_bs).sum(), mask_bs.sum()])
    if cp_group.size() > 1:
        # All-reduce over the context group: the baseline is the mean over the full micro-batch,
        # whose positions are split over it. Tensor ranks hold the same losses.
        torch.distributed.all_reduce(sums, group=cp_group)
    total, count = sums.unbind()
    others = (count - 1).clamp(min=1)
    advantage_bs = mask_bs * (losses_bs * count - total) / others
    return advantage_bs if per_token else advantage_bs / count.clamp(min=1)


class ReinforceRouter(Router):
    """Router that samples k experts without replacement from softmax(logits), each weighted 1 / k.

    The router learns by REINFORCE (Williams 1992; for experts Bengio et al., arXiv 1511.06297, and
    Clark et al., arXiv 2202.01169, RL-R): its gradient is that of

        sum_t m_t (l_t - b_t) log P(choice of t),

    l_t the loss of predicting the next token, b_t the mean loss of the micro-batch's other tokens.
    Unbiased for a token's own loss (effects on later tokens are ignored), without any gradient
    through experts' outputs, and noisy: it learns slowly. Evaluation takes the k best.

    The backward pass of every layer needs the losses, so one pipeline stage must hold all layers.
    """

    is_random = True
    advantage_T: torch.Tensor
    """`advantages` of this rank's tokens in the last micro-batch."""

    def choose(self, logits_TE: torch.Tensor, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose experts as the class describes."""
        if not self.training:
            chosen_TE = top_choices(logits_TE, self.topk)
            return chosen_TE.to(logits_TE.dtype) / self.topk, chosen_TE
        assert self.draws is not None
        noise_TE = self.draws.gumbel(logits_TE.unflatten(0, (-1, batch))).flatten(0, 1)
        order_Tk = (logits_TE.detach() + noise_TE).topk(self.topk, dim=1).indices
        weights_TE = torch.zeros_like(logits_TE).scatter(1, order_Tk, 1 / self.topk)
        log_prob_T = log_probability(logits_TE, order_Tk)
        rewarded_TE: torch.Tensor = _Rewarded.apply(weights_TE, log_prob_T, self)  # type: ignore[no-untyped-call]
        return rewarded_TE, weights_TE > 0

    def reward(self, advantage_bs: torch.Tensor) -> None:
        """Set the `advantages` of this context rank's part of the micro-batch."""
        self.advantage_T = self.tokens.of_context_rank(advantage_bs.transpose(0, 1)).flatten()


class _Rewarded(torch.autograd.Function):
    """Identity on weights; the gradient of log-probabilities [T] is the router's advantages."""

    @staticmethod
    def forward(
        ctx: Any, weights_TE: torch.Tensor, log_prob_T: torch.Tensor, router: ReinforceRouter
    ) -> torch.Tensor:
        ctx.router, ctx.dtype = router, log_prob_T.dtype
        return weights_TE.view_as(weights_TE)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scale = MoEAuxLossAutoScaler.main_loss_backward_scale
        advantage_T = ctx.router.advantage_T * (1.0 if scale is None else scale)
        return None, advantage_T.to(ctx.dtype), None
