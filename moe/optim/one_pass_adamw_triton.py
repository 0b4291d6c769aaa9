"""Triton kernel behind one_pass_adamw.py: float32, elementwise."""
# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl

_BLOCK = 2048


@triton.jit
def _update_kernel(
    main_ptr,
    grad_ptr,
    mean_ptr,
    square_ptr,
    copy_ptr,
    size,
    factor,
    decay,
    beta1,
    beta2,
    step_size,
    root,
    epsilon,
    HAS_COPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    grad = tl.load(grad_ptr + place, mask=inside, other=0.0).to(tl.float32) * factor
    main = tl.load(main_ptr + place, mask=inside, other=0.0) * decay
    mean = tl.load(mean_ptr + place, mask=inside, other=0.0)
    square = tl.load(square_ptr + place, mask=inside, other=0.0)
    mean = beta1 * mean + (1 - beta1) * grad
    square = beta2 * square + (1 - beta2) * grad * grad
    main -= step_size * mean / (tl.sqrt(square) * root + epsilon)
    tl.store(mean_ptr + place, mean, mask=inside)
    tl.store(square_ptr + place, square, mask=inside)
    tl.store(main_ptr + place, main, mask=inside)
    if HAS_COPY:
        tl.store(copy_ptr + place, main.to(copy_ptr.dtype.element_ty), mask=inside)


def update(
    main: torch.Tensor,
    grad: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
    copy: torch.Tensor | None,
    factors: tuple[float, float, float, float, float, float, float],
) -> None:
    """Update contiguous tensors of one size in place, and ``copy`` of another dtype, if any.

    ``factors``: of the gradient, of the parameter (decay), beta1, beta2, learning rate over the
    first bias correction, one over the root of the second, epsilon.
    """
    size = main.numel()
    if size:
        last = main if copy is None else copy
        grid = (triton.cdiv(size, _BLOCK),)
        _update_kernel[grid](
            main, grad, mean, square, last, size, *factors, copy is not None, _BLOCK
        )
