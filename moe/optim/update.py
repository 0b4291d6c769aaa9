"""Norm of the gradient on the device, and the update with a clipped gradient.

Between the two the host reads the norm and checks it: see ``moe/training/step.py``.
"""

import math
from collections.abc import Sequence

import torch
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.utils import to_local_if_dtensor

from moetron.moe.megatron.version_differences import gradients_for_norm
from moetron.moe.optim.one_pass_adamw import OnePassAdamW


def parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """Return the chained optimizers, or the only one."""
    return optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]


@torch.no_grad()
def prepare_gradients(optimizer: MegatronOptimizer) -> torch.Tensor:
    """Prepare gradients for the update; return their squared norms, fp32 [N], on the device.

    As ``get_grad_norm`` of megatron-core 0.16.1 (optimizer/optimizer.py), but nothing waits for the
    device. N is the number of groups of ranks over which norms are reduced: one, or one for each
    chained optimizer. `norm_of` returns the norm.
    """
    optimizer.prepare_grads()  # into fp32; without loss scaling no overflow can occur
    chained = parts(optimizer)
    groups = [part.get_grad_stats_parallel_group() for part in chained]
    together = all(group == groups[0] for group in groups)
    gradients = [gradients_for_norm(part) for part in chained]
    if together:
        gradients = [[gradient for each in gradients for gradient in each]]
    squares = []
    for group, each in zip(groups, gradients, strict=False):
        square = _squared_norm([to_local_if_dtensor(gradient) for gradient in each])
        # All-reduce over ``grad_stats_parallel_group``: each rank holds gradients of its own shards
        # only. All ranks get the same norm and make the same decision.
        torch.distributed.all_reduce(square, group=group)
        squares.append(square)
    return torch.cat(squares)


def _squared_norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """Return the squared norm of all ``gradients`` together, fp32 [1]."""
    if not gradients:
        return torch.zeros(1, device=torch.cuda.current_device())
    norms = torch.stack(torch._foreach_norm(gradients, 2, torch.float32))  # few kernels
    return torch.linalg.vector_norm(norms).square()[None]


def norm_of(squares: Sequence[float]) -> float:
    """Return the norm of the full gradient for the values of `prepare_gradients`."""
    norms = [square**0.5 for square in squares]
    return norms[0] if len(norms) == 1 else math.sqrt(sum(norm**2 for norm in norms))


@torch.no_grad()
def clip_and_update(optimizer: MegatronOptimizer, grad_norm: float) -> None:
    """Clip the prepared gradients by their norm ``grad_norm`` and update the weights.

    As ``ChainedOptimizer.step`` of megatron-core 0.16.1: one norm over the gradients of all chained
    optimizers clips each of them. A norm within the limit costs nothing.
    """
    for part in parts(optimizer):
        if getattr(part, "is_stub_optimizer", False) or part.config.clip_grad <= 0.0:
            continue
        coefficient = part.config.clip_grad / (grad_norm + 1.0e-6)
        if isinstance(part.optimizer, OnePassAdamW):
            part.optimizer.grad_factor = min(coefficient, 1.0)
            continue
        name = (
            "decoupled_grad"
            if part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
            else "grad"
        )
        found = (getattr(parameter, name, None) for parameter in part.get_parameters())
        gradients = [to_local_if_dtensor(each) for each in found if each is not None]
        if gradients and coefficient < 1.0:
            torch._foreach_mul_(gradients, coefficient)  # few kernels, however many tensors
    # The distributed optimizer updates this rank's shard of the parameters, then all-gathers them
    # over the data-parallel group (experts: theirs).
    optimizer.step_with_ready_grads()
