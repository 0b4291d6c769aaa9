"""Grouped products of the experts, bf16 and FP8, forward and both gradients, by layout."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from tests.bench.gpu.kernel_case import Case, Group, Shape

_E4M3 = torch.float8_e4m3fn


def _sizes(shape: Shape) -> dict[str, tuple[int, int]]:
    """Return the inputs and outputs of both layers (gate and up in one)."""
    return {"fc1": (shape.H, 2 * shape.F), "fc2": (shape.F, shape.H)}


def grouped_mm(shape: Shape) -> Iterator[Case]:
    """Yield bf16 products: rows x width with experts' weights [out, width]."""
    ends = shape.ends()
    for layer, (width, out) in _sizes(shape).items():
        flops = 2 * shape.rows * width * out
        x, grad = shape.random(shape.rows, width), shape.random(shape.rows, out)
        weight = shape.random(shape.E, out, width)
        for name, left, right in (
            ("forward", x, weight.transpose(1, 2)),
            ("dgrad", grad, weight),
            ("wgrad", grad.t(), x),
        ):
            yield Case(
                f"{layer} {name}",
                lambda left=left, right=right: F.grouped_mm(left, right, offs=ends),
                flops,
            )


def uneven_grouped_mm(shape: Shape) -> Iterator[Case]:
    """Yield the forward products with a busiest expert of four times the mean load."""
    sizes = torch.full((shape.E,), shape.rows // shape.E, dtype=torch.int64)
    taken = sizes[1:7] // 2
    sizes[1:7] -= taken
    sizes[0] += taken.sum()
    ends = sizes.cumsum(0).to(shape.device, torch.int32)
    for layer, (width, out) in _sizes(shape).items():
        x, weight = shape.random(shape.rows, width), shape.random(shape.E, out, width)
        yield Case(
            f"{layer} forward, load 4 x mean",
            lambda x=x, w=weight: F.grouped_mm(x, w.transpose(1, 2), offs=ends),
            2 * shape.rows * width * out,
        )


def fp8_matrix_product(shape: Shape) -> Iterator[Case]:
    """Yield large FP8 products: the ceiling of FP8."""
    size = 8192 if shape.device.type == "cuda" else 64
    left = torch.randn(size, size, device=shape.device).to(_E4M3)
    right = torch.randn(size, size, device=shape.device).to(_E4M3).t()
    one = torch.ones((), device=shape.device)
    rows, columns = (torch.ones(n, device=shape.device) for n in ((size, 1), (1, size)))
    for name, scales in (("tensorwise", (one, one)), ("rowwise", (rows, columns))):
        for fast in (True, False):
            yield Case(
                f"{size}^3 {name}, fast accumulation {fast}",
                lambda s=scales, fast=fast: torch._scaled_mm(
                    left, right, *s, out_dtype=torch.bfloat16, use_fast_accum=fast
                ),
                2 * size**3,
            )


def fp8_grouped_mm(shape: Shape) -> Iterator[Case]:
    """Yield FP8 products with a scale a row; also of layouts that may be refused."""
    ends = shape.ends()
    for layer, (width, out) in _sizes(shape).items():
        flops = 2 * shape.rows * width * out
        x = shape.random(shape.rows, width).to(_E4M3)
        grad = shape.random(shape.rows, out).to(_E4M3)
        weight = shape.random(shape.E, out, width).to(_E4M3)
        transposed = weight.transpose(1, 2).contiguous()  # [E, width, out]
        x_t, grad_t = (t.t().contiguous() for t in (x, grad))
        for name, left, right in (
            ("forward, weight [E, out, in] transposed", x, weight.transpose(1, 2)),
            ("forward, weight [E, in, out] row-major", x, transposed),
            ("dgrad, weight [E, in, out] transposed", grad, transposed.transpose(1, 2)),
            ("dgrad, weight [E, out, in] row-major", grad, weight),
            ("wgrad, both operands transposed copies", grad_t, x_t.t()),
            ("wgrad, no copies", grad.t(), x),
        ):
            scales = _scales(left, right, shape.E)
            yield Case(
                f"{layer} {name}",
                lambda left=left, right=right, scales=scales: torch._scaled_grouped_mm(
                    left, right, *scales, ends, out_dtype=torch.bfloat16, use_fast_accum=True
                ),
                flops,
            )


def _scales(
    left: torch.Tensor, right: torch.Tensor, experts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scales of the rows of ``left`` and the columns of ``right``: fp32.

    For products [M, K] x [E, K, N]: [M] and [E, N]; where K is grouped, [E M] and [E N].
    """
    if right.dim() == 3:
        sizes: tuple[tuple[int, ...], ...] = ((left.shape[0],), (experts, right.shape[2]))
    else:
        sizes = ((experts * left.shape[0],), (experts * right.shape[1],))
    first, second = (torch.ones(size, device=left.device) for size in sizes)
    return first, second


GROUPS: list[Group] = [
    grouped_mm,
    uneven_grouped_mm,
    fp8_matrix_product,
    fp8_grouped_mm,
]
