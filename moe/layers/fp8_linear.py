"""The local linear layers with FP8 products, and experts with emulated ones."""

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from moetron.moe.kernels.expert_rows import ExpertRows
from moetron.moe.layers.expert_variants import SeparateExperts
from moetron.moe.layers.experts import Layer
from moetron.moe.numerics.fp8_emulation import Fp8Numerics
from moetron.moe.numerics.fp8_matmul import Fp8Product
from moetron.moe.numerics.scaled_matmul import ScaledProduct, fp8_product


def fp8_linear(
    product: Fp8Product | ScaledProduct, x: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """Multiply x [..., K] by the transposed weight [N, K]."""
    x_TK = x.reshape(-1, x.shape[-1])
    if isinstance(product, ScaledProduct):
        return product(x_TK, weight).view(*x.shape[:-1], -1)
    ends = torch.tensor([len(x_TK)], dtype=torch.int32, device=x.device)
    return product(x_TK, weight.unsqueeze(0), ends).view(*x.shape[:-1], -1)


class Fp8ColumnParallelLinear(ColumnParallelLinear):
    """megatron-core's layer with an FP8 product; the gathered sequence is quantised.

    Args:
        numerics: the recipe.
        args: of ``ColumnParallelLinear``, as are ``kwargs``.
    """

    def __init__(self, *args: Any, numerics: Fp8Numerics, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._fp8 = fp8_product(numerics, *self.weight.shape)

    def _forward_impl(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: torch.distributed.ProcessGroup,
        **_: Any,
    ) -> torch.Tensor:
        if sequence_parallel:
            # All-gather over the tensor group: ranks hold different positions but all multiply the
            # full sequence by their columns. Backward reduce-scatters the input gradient.
            input = gather_from_sequence_parallel_region(input, group=tp_group)
        elif allreduce_dgrad:
            # Identity; backward all-reduces over the tensor group, whose ranks each compute the
            # input gradient of their own columns.
            input = copy_to_tensor_model_parallel_region(input, group=tp_group)
        output = fp8_linear(self._fp8, input, weight)
        return output if bias is None else output + bias


class Fp8RowParallelLinear(RowParallelLinear):
    """megatron-core's layer with an FP8 product; ``forward`` sums partial results unquantised.

    Args:
        numerics: the recipe.
        args: of ``RowParallelLinear``, as are ``kwargs``.
    """

    def __init__(self, *args: Any, numerics: Fp8Numerics, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._fp8 = fp8_product(numerics, *self.weight.shape)

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, **_: Any) -> torch.Tensor:
        return fp8_linear(self._fp8, input, weight)


class Fp8GroupedExperts(SeparateExperts):
    """Grouped experts with emulated FP8 products; every expert has its own scales.

    Args:
        numerics: the recipe.
        args: of ``GroupedExperts``, as are ``kwargs``.
    """

    def __init__(self, *args: Any, numerics: Fp8Numerics, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._fp8 = torch.nn.ModuleDict({layer: Fp8Product(numerics) for layer in ("fc1", "fc2")})

    def product(
        self, layer: Layer, x: torch.Tensor, weight: torch.Tensor, rows: ExpertRows
    ) -> torch.Tensor:
        """Multiply each expert's rows by its transposed weight."""
        product: torch.Tensor = self._fp8[layer](x, weight, rows.ends_E)
        return product
