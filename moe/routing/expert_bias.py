"""The bias that balances experts without a loss (arXiv 2408.15664), updated in whole numbers."""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads

from moetron.moe.routing.router import Router


def surplus_signs(counts_LE: torch.Tensor) -> torch.Tensor:
    """Sign of count - mean count for counts int64 [L, E], exact for any number of tokens.

    megatron-core's mean is fp32, which has no odd number above 2^24.
    """
    return (counts_LE * counts_LE.shape[-1] - counts_LE.sum(-1, keepdim=True)).sign()


def update_expert_biases(chunks: Sequence[torch.nn.Module]) -> None:
    """Move every bias by its rate against the surplus of the step, and forget the counts.

    Collective: counts are summed over the ranks that hold the same layers (TP x CP x DP).
    """
    modules = (module for chunk in chunks for module in chunk.modules())
    routers = [m for m in modules if isinstance(m, Router) and m.enable_expert_bias]
    if not routers:
        return
    counts_LE = torch.stack([router.local_tokens_per_expert for router in routers])
    group = routers[0].tp_dp_cp_group
    if group.size() > 1:
        torch.distributed.all_reduce(counts_LE, group=group)
    for router, sign_E in zip(routers, surplus_signs(counts_LE), strict=True):
        router._maintain_float32_expert_bias()
        router.expert_bias -= router.config.moe_router_bias_update_rate * sign_E
        router.local_tokens_per_expert.zero_()


def finalize_gradients(model: list[torch.nn.Module], *args: Any, **kwargs: Any) -> None:
    """megatron-core's ``finalize_model_grads``, after `update_expert_biases`.

    It then finds counts of zero, which move no bias.
    """
    update_expert_biases(model)
    finalize_model_grads(model, *args, **kwargs)
