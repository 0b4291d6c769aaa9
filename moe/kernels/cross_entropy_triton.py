"""Triton kernels behind cross_entropy.py."""
# mypy: allow-untyped-defs

import triton
import triton.language as tl


@triton.jit
def forward_kernel(
    logits,
    labels,
    log_z,
    label_logit,
    row_stride,
    first,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write log(sum of exp) of one row and its label's logit (0 if another rank holds it)."""
    token = tl.program_id(0).to(tl.int64)  # T x V exceeds 2^31
    row = logits + token * row_stride
    largest = tl.full((), -float("inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for begin in range(0, COLUMNS, BLOCK):
        place = begin + tl.arange(0, BLOCK)
        x = tl.load(row + place, mask=place < COLUMNS, other=-float("inf")).to(tl.float32)
        new = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp(largest - new) + tl.sum(tl.exp(x - new), 0)
        largest = new
    label = tl.load(labels + token) - first
    is_here = (label >= 0) & (label < COLUMNS)
    found = tl.load(row + tl.where(is_here, label, 0), mask=is_here, other=0.0)
    tl.store(label_logit + token, found.to(tl.float32))
    tl.store(log_z + token, largest + tl.log(total))


@triton.jit
def backward_kernel(
    logits,
    result,
    labels,
    log_z,
    grad_loss,
    grad_log_z,
    row_stride,
    first,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the gradient of one block of one row; ``result`` may be ``logits``."""
    token = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    of_loss = tl.load(grad_loss + token)
    of_all = of_loss + tl.load(grad_log_z + token)
    # A row without gradient, such as one that the loss mask drops, is written but not read.
    is_unused = tl.abs(of_loss) + tl.abs(of_all) == 0.0
    source = logits + token * row_stride + place
    end = tl.where(is_unused, 0, COLUMNS)
    x = tl.load(source, mask=place < end, other=-float("inf")).to(tl.float32)
    label = tl.load(labels + token) - first
    probability = tl.exp(x - tl.load(log_z + token))
    grad = probability * of_all - tl.where(place == label, of_loss, 0.0)
    grad = tl.where(is_unused, 0.0, grad)
    target = result + token * row_stride + place
    tl.store(target, grad.to(result.dtype.element_ty), mask=place < COLUMNS)
