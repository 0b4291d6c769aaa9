"""Clip the gradient and update the weights, with a check of the gradient norm in between."""

from collections.abc import Callable

import torch
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer


@torch.no_grad()
def clip_and_update(optimizer: MegatronOptimizer, check: Callable[[float], None]) -> float:
    """Run ``optimizer.step()``, but call ``check`` before any weight changes.

    As ``ChainedOptimizer.step`` of megatron-core 0.16.1 (optimizer/optimizer.py): one norm over the
    gradients of all chained optimizers clips each of them.

    Args:
        optimizer: its gradients are reduced over the data-parallel ranks.
        check: takes the norm of the full gradient before clipping; raises to prevent the update,
            which leaves weights and optimizer state unchanged.

    Returns:
        The norm of the full gradient before clipping.
    """
    optimizer.prepare_grads()  # into fp32; without loss scaling no overflow can occur
    # All-reduce of squared norms over ``grad_stats_parallel_group``: each rank holds gradients of
    # its own shards only. All ranks get the same norm and make the same decision.
    grad_norm = float(optimizer.get_grad_norm())
    check(grad_norm)
    chained = isinstance(optimizer, ChainedOptimizer)
    for part in optimizer.chained_optimizers if chained else [optimizer]:
        if getattr(part, "is_stub_optimizer", False):
            continue
        parameters, clip_grad = part.get_parameters(), part.config.clip_grad
        if parameters and clip_grad > 0.0:
            decoupled = part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
            clip_grad_by_total_norm_fp32(parameters, clip_grad, grad_norm, decoupled)
    # The distributed optimizer updates this rank's shard of the parameters, then all-gathers them
    # over the data-parallel group (experts: theirs).
    optimizer.step_with_ready_grads()
    return grad_norm
