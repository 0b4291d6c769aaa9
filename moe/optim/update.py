"""Clip the gradient and move the weights, with a last look at the gradient norm in between."""

from collections.abc import Callable

import torch
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer


@torch.no_grad()
def clip_and_update(optimizer: MegatronOptimizer, check: Callable[[float], None]) -> float:
    """Do what ``optimizer.step()`` does, but call ``check`` before any weight changes.

    As ``ChainedOptimizer.step`` of megatron-core 0.16.1 (optimizer/optimizer.py): one norm over the
    gradients of all chained optimizers clips each of them. The norm is reduced over the ranks that
    hold the whole model (``grad_stats_parallel_group``), so all ranks see the same number and come
    to the same decision. The distributed optimizer's update ends with an all-gather of parameters
    over the data-parallel group.

    Args:
        optimizer: its gradients are reduced over the data-parallel ranks.
        check: takes the norm of the whole gradient before clipping; raises to prevent the update,
            which leaves weights and optimizer state as they were.

    Returns:
        The norm of the whole gradient before clipping.
    """
    optimizer.prepare_grads()  # into fp32; without loss scaling there is no overflow to find
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
    optimizer.step_with_ready_grads()
    return grad_norm
