"""Matrix products on FP8 tensor cores: forward and input gradient, but no weight gradient."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F

from moetron.moe.kernels.fp8_rows import (
    Fp8Rows,
    quantize_columns,
    quantize_rows,
    scaled_grouped_mm,
    scaled_mm,
)


class ScaledWeight:
    """FP8 copies of a parameter [experts, outputs, inputs], made when first needed.

    They hold until the parameter is written to. Writes through ``.data`` (megatron-core's
    optimizers copy their shards so) are invisible: `expire` after each optimizer step.
    """

    def __init__(self) -> None:
        self._written: tuple[int, int] | None = None
        self._rows: Fp8Rows | None = None
        self._columns: Fp8Rows | None = None

    def expire(self) -> None:
        """Drop the copies."""
        self._written = self._rows = self._columns = None

    def rows(self, weight_ENK: torch.Tensor) -> Fp8Rows:
        """Return [experts, outputs, inputs], one scale an output: for the forward product."""
        self._expire_if_written(weight_ENK)
        if self._rows is None:
            self._rows = quantize_rows(weight_ENK.detach())
        return self._rows

    def columns(self, weight_ENK: torch.Tensor) -> Fp8Rows:
        """Return [experts, inputs, outputs], one scale an input: for the input gradient."""
        self._expire_if_written(weight_ENK)
        if self._columns is None:
            self._columns = quantize_columns(weight_ENK.detach())
        return self._columns

    def _expire_if_written(self, weight_ENK: torch.Tensor) -> None:
        written = (weight_ENK.data_ptr(), weight_ENK._version)
        if self._written != written:
            self.expire()
            self._written = written


class ScaledProduct(torch.nn.Module):
    """Product y = x W^T of a linear layer, or of each expert of a rank, on FP8 tensor cores.

    y = q(x) q(W)^T and dx = q(dy) q(W) with E4M3 operands that have one current scale for each
    token, and for each output or input channel of an expert's weight: the axis that the product
    keeps. dW = dy^T x is not quantised: its operands would need scales along tokens, transposed
    copies of both and experts' rows padded to multiples of 16, which cost more time than the faster
    product saves.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = ScaledWeight()

    def forward(
        self, x_TK: torch.Tensor, weight_ENK: torch.Tensor, ends_E: torch.Tensor
    ) -> torch.Tensor:
        """Multiply; arguments and result are those of ``Fp8Product``."""
        y_TN: torch.Tensor = _Product.apply(x_TK, weight_ENK, ends_E, self.weight)
        return y_TN


def expire_weights(chunks: Iterable[torch.nn.Module]) -> None:
    """Drop the FP8 copies of all weights in the model chunks, which an optimizer has updated."""
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, ScaledProduct):
                module.weight.expire()


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TK: torch.Tensor,
        weight_ENK: torch.Tensor,
        ends_E: torch.Tensor,
        weight: ScaledWeight,
    ) -> torch.Tensor:
        ctx.save_for_backward(x_TK, weight_ENK, ends_E)
        ctx.weight = weight
        return multiply(quantize_rows(x_TK), weight.rows(weight_ENK), ends_E, x_TK.dtype)

    @staticmethod
    def backward(ctx: Any, grad_TN: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TK, weight_ENK, ends_E = ctx.saved_tensors
        grad_TN = grad_TN.contiguous()
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            columns = ctx.weight.columns(weight_ENK)
            grad_x = multiply(quantize_rows(grad_TN), columns, ends_E, x_TK.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_gradient(grad_TN, x_TK, ends_E).to(weight_ENK.dtype)
        return grad_x, grad_weight, None, None


def multiply(
    x_TK: Fp8Rows, weight_ENK: Fp8Rows, ends_E: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Multiply the rows of each expert, or all by the only matrix; see `scaled_grouped_mm`."""
    if len(ends_E) > 1:
        return scaled_grouped_mm(x_TK, weight_ENK, ends_E, dtype)
    return scaled_mm(x_TK, Fp8Rows(weight_ENK.values[0], weight_ENK.inverse[0]), dtype)


def _weight_gradient(
    grad_TN: torch.Tensor, x_TK: torch.Tensor, ends_E: torch.Tensor
) -> torch.Tensor:
    if len(ends_E) == 1:
        return (grad_TN.t() @ x_TK).unsqueeze(0)
    return F.grouped_mm(grad_TN.t(), x_TK, offs=ends_E)
