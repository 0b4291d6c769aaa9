"""Triton kernels behind activation.py: one program per row, in float32."""
# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl

_MAX_BLOCK = 4096


@triton.jit
def _activated(x, KIND: tl.constexpr):
    if KIND == 0:  # silu
        y = x * tl.sigmoid(x)
    elif KIND == 1:  # gelu, exact
        y = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    else:  # relu
        y = tl.where(x > 0, x, 0.0)
    return y


@triton.jit
def _slope(x, KIND: tl.constexpr):
    if KIND == 0:
        s = tl.sigmoid(x)
        d = s * (1 + x * (1 - s))
    elif KIND == 1:
        below = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        d = below + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        d = tl.where(x > 0, 1.0, 0.0)
    return d


@triton.jit
def _forward_kernel(
    hidden_ptr,
    weight_ptr,
    out_ptr,
    WIDTH: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weight_ptr + row).to(tl.float32)
    hidden_ptr += row * WIDTH * (2 if GATED else 1)
    for start in tl.static_range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < WIDTH
        gate = tl.load(hidden_ptr + column, mask=inside, other=0.0).to(tl.float32)
        y = _activated(gate, KIND)
        if GATED:
            y *= tl.load(hidden_ptr + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
        y *= weight  # last, as in the backward kernel
        tl.store(out_ptr + row * WIDTH + column, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    grad_ptr,
    hidden_ptr,
    weight_ptr,
    grad_hidden_ptr,
    grad_weight_ptr,
    out_ptr,
    WIDTH: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weight_ptr + row).to(tl.float32)
    hidden_ptr += row * WIDTH * (2 if GATED else 1)
    grad_hidden_ptr += row * WIDTH * (2 if GATED else 1)
    product = tl.zeros([BLOCK], dtype=tl.float32)
    for start in tl.static_range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < WIDTH
        grad = tl.load(grad_ptr + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(hidden_ptr + column, mask=inside, other=0.0).to(tl.float32)
        inner = _activated(gate, KIND)
        slope = _slope(gate, KIND)
        if GATED:
            up = tl.load(hidden_ptr + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
            grad_up = grad * weight * inner
            up_ptr = grad_hidden_ptr + WIDTH + column
            tl.store(up_ptr, grad_up.to(grad_hidden_ptr.dtype.element_ty), mask=inside)
            inner *= up
            slope *= up
        grad_gate = grad * weight * slope
        gate_ptr = grad_hidden_ptr + column
        tl.store(gate_ptr, grad_gate.to(grad_hidden_ptr.dtype.element_ty), mask=inside)
        y = inner * weight
        tl.store(out_ptr + row * WIDTH + column, y.to(out_ptr.dtype.element_ty), mask=inside)
        product += grad * inner
    total = tl.sum(product, axis=0)
    tl.store(grad_weight_ptr + row, total.to(grad_weight_ptr.dtype.element_ty))


def _sizes(hidden: torch.Tensor, gated: bool) -> tuple[int, int, int]:
    rows, width = hidden.shape[0], hidden.shape[1] // (2 if gated else 1)
    return rows, width, min(triton.next_power_of_2(width), _MAX_BLOCK)


def forward(hidden: torch.Tensor, weight_R: torch.Tensor, kind: int, gated: bool) -> torch.Tensor:
    """Return the weighted activation."""
    rows, width, block = _sizes(hidden, gated)
    out_RF = hidden.new_empty(rows, width)
    if rows:
        _forward_kernel[(rows,)](
            hidden.contiguous(),
            weight_R.contiguous(),
            out_RF,
            WIDTH=width,
            KIND=kind,
            GATED=gated,
            BLOCK=block,
        )
    return out_RF


def backward(
    grad_RF: torch.Tensor, hidden: torch.Tensor, weight_R: torch.Tensor, kind: int, gated: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of ``hidden`` and of the weights, and the weighted activation."""
    rows, width, block = _sizes(hidden, gated)
    grad_hidden, out_RF = torch.empty_like(hidden), hidden.new_empty(rows, width)
    grad_weight_R = torch.empty_like(weight_R)
    if rows:
        _backward_kernel[(rows,)](
            grad_RF.contiguous(),
            hidden.contiguous(),
            weight_R.contiguous(),
            grad_hidden,
            grad_weight_R,
            out_RF,
            WIDTH=width,
            KIND=kind,
            GATED=gated,
            BLOCK=block,
        )
    return grad_hidden, grad_weight_R, out_RF
