"""Matrix products with FP8 operands: forward, input gradient and weight gradient."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from moetron.moe.numerics.fp8_emulation import (
    DelayedScale,
    Fp8Numerics,
    Role,
    Rows,
    quantize_tokens,
    quantize_weights,
    round_to_fp8,
)

Operand = Callable[[bool], torch.Tensor]
"""Quantised operand; the argument: the product sums over its first axis (tokens of activations and
gradients, outputs of weights), not over its last."""


class Fp8Product(torch.nn.Module):
    """Product y = x W^T of a linear layer, or of each expert of a rank, with FP8 operands.

    y = q(x) q(W)^T, dx = q(dy) q(W), dW = q(dy)^T q(x), each in float32 and cast to the dtype of x
    or W. Every operand is quantised from high precision for the axis that its product sums over;
    recipes with one scale per tensor quantise once.

    Args:
        numerics: the recipe; ``delayed`` is stateful.
    """

    def __init__(self, numerics: Fp8Numerics) -> None:
        super().__init__()
        self.numerics = numerics
        roles: tuple[Role, ...] = ("input", "weight", "gradient")
        self._scales = {role: DelayedScale(numerics, role) for role in roles}

    def forward(
        self, x_TK: torch.Tensor, weight_ENK: torch.Tensor, ends_E: torch.Tensor
    ) -> torch.Tensor:
        """Multiply.

        Args:
            x_TK: [tokens, inputs], sorted by expert.
            weight_ENK: [experts, outputs, inputs]; one expert for a dense layer.
            ends_E: int32 [experts], one past each expert's last row; the last is ``tokens``.

        Returns:
            [tokens, outputs] in the dtype of x.
        """
        record = torch.is_grad_enabled()
        y_TN: torch.Tensor = _Product.apply(x_TK, weight_ENK, Rows(ends_E), self, record)
        return y_TN

    def state(self) -> torch.Tensor | None:
        """Return the state of ``delayed``, [roles, history + 1, experts], or None before a call.

        Roles are inputs, weights and gradients; see ``DelayedScale.state``.
        """
        states = [scale.state() for scale in self._scales.values()]
        known = next((state for state in states if len(state)), None)
        if known is None:
            return None
        blank = torch.cat([torch.zeros_like(known[:-1]), torch.ones_like(known[-1:])])
        return torch.stack([state if len(state) else blank for state in states])

    def set_state(self, state: torch.Tensor) -> None:
        """Restore a state returned by ``state``."""
        for scale, part in zip(self._scales.values(), state.unbind(), strict=True):
            scale.set_state(part)

    def tokens(self, x_TK: torch.Tensor, rows: Rows, role: Role, record: bool) -> Operand:
        """Quantise activations or gradients; ``record``: add their amax to the history."""
        if self.numerics.recipe == "delayed":
            scale_E = self._scales[role].use(rows.amax(x_TK), record)
            return self._fixed(x_TK, scale_E[rows.expert_T].unsqueeze(1), role)
        return lambda first: quantize_tokens(x_TK, rows, self.numerics, role, first)

    def weights(self, weight_ENK: torch.Tensor, record: bool) -> Operand:
        """Quantise weights; ``record``: add their amax to the history."""
        if self.numerics.recipe == "delayed":
            amax_E = weight_ENK.abs().float().amax((1, 2))
            scale_E = self._scales["weight"].use(amax_E, record)
            return self._fixed(weight_ENK, scale_E[:, None, None], "weight")
        return lambda first: quantize_weights(weight_ENK, self.numerics, first)

    def _fixed(self, x: torch.Tensor, scale: torch.Tensor, role: Role) -> Operand:
        return lambda _: round_to_fp8(x, scale, self.numerics.dtype(role))


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TK: torch.Tensor,
        weight_ENK: torch.Tensor,
        rows: Rows,
        product: Fp8Product,
        record: bool,
    ) -> torch.Tensor:
        x, weight = product.tokens(x_TK, rows, "input", record), product.weights(weight_ENK, record)
        ctx.operands, ctx.dtypes = (x, weight), (x_TK.dtype, weight_ENK.dtype)
        ctx.rows, ctx.product = rows, product
        return _multiply(x(False), weight(False).transpose(1, 2), rows).to(x_TK.dtype)

    @staticmethod
    def backward(ctx: Any, grad_TN: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x, weight), (x_dtype, weight_dtype) = ctx.operands, ctx.dtypes
        grad = ctx.product.tokens(grad_TN, ctx.rows, "gradient", True)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = _multiply(grad(False), weight(True), ctx.rows).to(x_dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = _multiply_transposed(grad(True), x(True), ctx.rows).to(weight_dtype)
        return grad_x, grad_weight, None, None, None


def _multiply(x_TK: torch.Tensor, matrix_EKN: torch.Tensor, rows: Rows) -> torch.Tensor:
    if rows.experts == 1:
        return x_TK @ matrix_EKN[0]
    return F.grouped_mm(x_TK, matrix_EKN, offs=rows.ends_E)


def _multiply_transposed(grad_TN: torch.Tensor, x_TK: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Return grad^T x over each expert's rows: [experts, N, K]."""
    if rows.experts == 1:
        return (grad_TN.t() @ x_TK).unsqueeze(0)
    return F.grouped_mm(grad_TN.t(), x_TK, offs=rows.ends_E)
