"""megatron-core's local linear layers with weight gradients that can wait.

Shapes: S positions x B sequences, O outputs, I inputs, s positions of this tensor rank under
sequence parallelism.
"""

from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch.distributed import ProcessGroup

from moetron.moe.overlap.delayed_gradients import DelayedGradients


class _Linear(torch.autograd.Function):
    """``x @ weight.t() + bias`` and its gradients, those of the weight by `DelayedGradients`.

    The same products as in megatron-core's ``LinearWithGradAccumulationAndAsyncCommunication``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_sBI: torch.Tensor,
        weight_OI: torch.nn.Parameter,
        bias_O: torch.Tensor | None,
        layer: DelayedGradients,
        sums_input_gradient: bool,
        gathers: bool,
        group: ProcessGroup | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(x_sBI, weight_OI)
        ctx.layer, ctx.group, ctx.has_bias = layer, group, bias_O is not None
        ctx.sums_input_gradient, ctx.gathers = sums_input_gradient, gathers
        out_SBO = _all_positions(x_sBI, gathers, group).matmul(weight_OI.t())
        return out_SBO if bias_O is None else out_SBO + bias_O

    @staticmethod
    def backward(ctx: Any, grad_SBO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_sBI, weight_OI = ctx.saved_tensors
        grad_x = grad_SBO.matmul(weight_OI)
        if ctx.gathers:
            # Reduce-scatter over the tensor group: every rank has the gradient of its own columns
            # for all positions, and keeps the sum for its own positions.
            grad_x = reduce_scatter_to_sequence_parallel_region(grad_x, group=ctx.group)
        elif ctx.sums_input_gradient:
            # All-reduce over the tensor group: ranks have the gradients of their own columns.
            torch.distributed.all_reduce(grad_x, group=ctx.group)
        grad_2d = grad_SBO.reshape(-1, grad_SBO.shape[-1])
        product = partial(_weight_gradient, grad_2d, x_sBI, ctx.gathers, ctx.group)
        grad_weight = ctx.layer.gradient(weight_OI, product)
        grad_bias = grad_2d.sum(0) if ctx.has_bias else None
        return grad_x, grad_weight, grad_bias, None, None, None, None


def _all_positions(x_sBI: torch.Tensor, gathers: bool, group: ProcessGroup | None) -> torch.Tensor:
    """Return the input of the product."""
    if not gathers:
        return x_sBI
    # All-gather over the tensor group: ranks hold different positions, but all of them multiply
    # the full sequence by their columns.
    everything: torch.Tensor = gather_from_sequence_parallel_region(x_sBI, group=group)
    return everything


def _weight_gradient(
    grad_2d: torch.Tensor, x_sBI: torch.Tensor, gathers: bool, group: ProcessGroup | None
) -> torch.Tensor:
    """Return the gradient [O, I]; gathers the input again, which is not kept."""
    x_SBI = _all_positions(x_sBI, gathers, group)
    return grad_2d.t().matmul(x_SBI.reshape(-1, x_SBI.shape[-1]))


def delayed_product(
    layer: DelayedGradients, x: torch.Tensor, weight: torch.nn.Parameter
) -> torch.Tensor:
    """Return ``x @ weight.t()`` without communication; ``layer`` delays the weight's gradient."""
    out: torch.Tensor = _Linear.apply(x, weight, None, layer, False, False, None)  # type: ignore[no-untyped-call]
    return out


class _DelayedLinear(DelayedGradients):
    """Product of the parallel linear layers, by `_Linear`."""

    def _forward_impl(
        self,
        input: torch.Tensor,
        weight: torch.nn.Parameter,
        bias: torch.Tensor | None,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: ProcessGroup | None,
        **_: Any,
    ) -> torch.Tensor:
        out: torch.Tensor = _Linear.apply(  # type: ignore[no-untyped-call]
            input, weight, bias, self, allreduce_dgrad, sequence_parallel, tp_group
        )
        return out


class DelayedColumnParallelLinear(_DelayedLinear, ColumnParallelLinear):
    """Column-parallel layer with delayed weight gradients.

    Args:
        args: of ``ColumnParallelLinear``, as are ``kwargs``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.delay(self.weight)


class DelayedRowParallelLinear(_DelayedLinear, RowParallelLinear):
    """Row-parallel layer with delayed weight gradients.

    Args:
        args: of ``RowParallelLinear``, as are ``kwargs``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.delay(self.weight)
