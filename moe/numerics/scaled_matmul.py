"""Matrix products on FP8 tensor cores: forward and input gradient, but no weight gradient."""

from collections.abc import Iterable
from typing import Any

import torch

from moetron.moe.kernels.fp8_rows import Fp8Rows, quantize_columns, quantize_rows, scaled_mm
from moetron.moe.numerics.fp8_emulation import Fp8Numerics
from moetron.moe.numerics.fp8_matmul import Fp8Product

_WIDTH_MULTIPLE = 16  # of inputs and outputs, for torch's products of scaled FP8 matrices


class ScaledWeight(torch.nn.Module):
    """FP8 copies of a parameter [..., outputs, inputs], made when first needed.

    They hold until the parameter is written to. Writes through ``.data`` (megatron-core's
    optimizers copy their shards so) are invisible: `expire_weights` after each optimizer step.
    """

    def __init__(self) -> None:
        super().__init__()
        self._written: tuple[int, int] | None = None
        self._rows: Fp8Rows | None = None
        self._columns: Fp8Rows | None = None

    def expire(self) -> None:
        """Drop the copies."""
        self._written = self._rows = self._columns = None

    def rows(self, weight: torch.Tensor) -> Fp8Rows:
        """Return [..., outputs, inputs], one scale an output: for the forward product."""
        self._expire_if_written(weight)
        if self._rows is None:
            self._rows = quantize_rows(weight.detach())
        return self._rows

    def columns(self, weight: torch.Tensor) -> Fp8Rows:
        """Return [..., inputs, outputs], one scale an input: for the input gradient."""
        self._expire_if_written(weight)
        if self._columns is None:
            self._columns = quantize_columns(weight.detach())
        return self._columns

    def _expire_if_written(self, weight: torch.Tensor) -> None:
        written = (weight.data_ptr(), weight._version)
        if self._written != written:
            self.expire()
            self._written = written


class ScaledProduct(torch.nn.Module):
    """Product y = x W^T of a linear layer on FP8 tensor cores.

    y = q(x) q(W)^T and dx = q(dy) q(W) with E4M3 operands that have one current scale for each
    token, and for each output or input channel of the weight: the axis that the product keeps.
    dW = dy^T x is not quantised: its operands need scales along the tokens and transposed copies
    of both.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copies = ScaledWeight()

    def forward(self, x_TK: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
        """Multiply [T, K] by the transposed [N, K]: [T, N] in the dtype of x."""
        y_TN: torch.Tensor = _Product.apply(x_TK, weight_NK, self.copies)
        return y_TN


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TK: torch.Tensor, weight_NK: torch.Tensor, copies: ScaledWeight
    ) -> torch.Tensor:
        ctx.save_for_backward(x_TK, weight_NK)
        ctx.copies = copies
        return scaled_mm(quantize_rows(x_TK), copies.rows(weight_NK), x_TK.dtype)

    @staticmethod
    def backward(ctx: Any, grad_TN: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TK, weight_NK = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            columns = ctx.copies.columns(weight_NK)
            grad_x = scaled_mm(quantize_rows(grad_TN), columns, x_TK.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = grad_TN.t() @ x_TK
        return grad_x, grad_weight, None


def fp8_product(numerics: Fp8Numerics, outputs: int, inputs: int) -> Fp8Product | ScaledProduct:
    """Return the product of a layer: on tensor cores if the numerics and its widths allow."""
    scaled = numerics.on_tensor_cores and fit_tensor_cores(outputs, inputs)
    return ScaledProduct() if scaled else Fp8Product(numerics)


def fit_tensor_cores(*widths: int) -> bool:
    """Return whether torch's products of scaled FP8 matrices support the widths."""
    return all(width % _WIDTH_MULTIPLE == 0 for width in widths)


def expire_weights(chunks: Iterable[torch.nn.Module]) -> None:
    """Drop the FP8 copies of all weights in the model chunks, which an optimizer has updated."""
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, ScaledWeight):
                module.expire()
