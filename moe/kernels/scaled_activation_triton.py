"""Triton kernels behind scaled_activation.py: one program per row, held in registers."""
# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl

from moetron.moe.kernels.activation_triton import _activated, _slope
from moetron.moe.kernels.fp8_rows_triton import magnitude_bits, scales, warps


@triton.jit
def _forward_kernel(
    hidden_ptr,
    weight_ptr,
    values_ptr,
    inverse_ptr,
    WIDTH: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    hidden_ptr += row * WIDTH * (2 if GATED else 1)
    gate = tl.load(hidden_ptr + column, mask=inside, other=0.0).to(tl.float32)
    y = _activated(gate, KIND) * tl.load(weight_ptr + row).to(tl.float32)
    if GATED:
        y *= tl.load(hidden_ptr + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    factor, inverse = scales(tl.max(magnitude_bits(y), axis=0))
    values = (y * factor).to(values_ptr.dtype.element_ty)
    tl.store(values_ptr + row * WIDTH + column, values, mask=inside)
    tl.store(inverse_ptr + row, inverse)


@triton.jit
def _backward_kernel(
    grad_ptr,
    hidden_ptr,
    weight_ptr,
    grad_hidden_ptr,
    values_ptr,
    inverse_ptr,
    grad_weight_ptr,
    out_ptr,
    WIDTH: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    weight = tl.load(weight_ptr + row).to(tl.float32)
    first = row * WIDTH * (2 if GATED else 1)  # of hidden and its gradient
    grad = tl.load(grad_ptr + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(hidden_ptr + first + column, mask=inside, other=0.0).to(tl.float32)
    inner = _activated(gate, KIND)
    slope = _slope(gate, KIND)
    grad_up = grad * weight * inner
    if GATED:
        up = tl.load(hidden_ptr + first + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
        inner *= up
        slope *= up
    grad_gate = grad * weight * slope
    bits = tl.max(magnitude_bits(grad_gate), axis=0)
    if GATED:
        bits = tl.maximum(bits, tl.max(magnitude_bits(grad_up), axis=0))
    factor, inverse = scales(bits)
    dtype = grad_hidden_ptr.dtype.element_ty
    fp8 = values_ptr.dtype.element_ty
    tl.store(grad_hidden_ptr + first + column, grad_gate.to(dtype), mask=inside)
    tl.store(values_ptr + first + column, (grad_gate * factor).to(fp8), mask=inside)
    if GATED:
        tl.store(grad_hidden_ptr + first + WIDTH + column, grad_up.to(dtype), mask=inside)
        tl.store(values_ptr + first + WIDTH + column, (grad_up * factor).to(fp8), mask=inside)
    tl.store(inverse_ptr + row, inverse)
    out = (inner * weight).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * WIDTH + column, out, mask=inside)
    total = tl.sum(grad * inner, axis=0)
    tl.store(grad_weight_ptr + row, total.to(grad_weight_ptr.dtype.element_ty))


def forward(
    hidden: torch.Tensor,
    weight_R: torch.Tensor,
    kind: int,
    gated: bool,
    values: torch.Tensor,
    inverse: torch.Tensor,
) -> None:
    """Write the weighted activation into ``values`` [R, F] and ``inverse`` [R]."""
    rows, width = values.shape
    block = triton.next_power_of_2(width)
    _forward_kernel[(rows,)](
        hidden.contiguous(),
        weight_R.contiguous(),
        values,
        inverse,
        WIDTH=width,
        KIND=kind,
        GATED=gated,
        BLOCK=block,
        num_warps=warps(block),
    )


def backward(
    grad_RF: torch.Tensor,
    hidden: torch.Tensor,
    weight_R: torch.Tensor,
    kind: int,
    gated: bool,
    values: torch.Tensor,
    inverse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of ``hidden`` and of the weights, and the weighted activation.

    The former is also written into ``values`` [R, 2F or F] and ``inverse`` [R].
    """
    rows, width = grad_RF.shape
    block = triton.next_power_of_2(width)
    grad_hidden, out_RF = torch.empty_like(hidden), hidden.new_empty(rows, width)
    grad_weight_R = torch.empty_like(weight_R)
    _backward_kernel[(rows,)](
        grad_RF.contiguous(),
        hidden.contiguous(),
        weight_R.contiguous(),
        grad_hidden,
        values,
        inverse,
        grad_weight_R,
        out_RF,
        WIDTH=width,
        KIND=kind,
        GATED=gated,
        BLOCK=block,
        num_warps=warps(block),
    )
    return grad_hidden, grad_weight_R, out_RF
