"""FP8 matrices with one scale a row, and their products.

The format is E4M3, the only one that the grouped FP8 product of torch takes. A row's scale is
current: its largest magnitude becomes 448, the largest number of the format. R rows, K their width;
E experts, N their outputs.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from moetron.moe.kernels.availability import is_interpreted, triton_is_installed, uses_triton

if triton_is_installed():
    from moetron.moe.kernels import fp8_rows_triton

DTYPE = torch.float8_e4m3fn
_LIMIT = torch.finfo(DTYPE).max  # 448
_LARGEST_FLOAT = torch.finfo(torch.float32).max


class Fp8Rows(NamedTuple):
    """Matrix or stack of matrices [..., K] whose value is ``values * inverse[..., None]``."""

    values: torch.Tensor
    """float8_e4m3fn [..., K], contiguous."""
    inverse: torch.Tensor
    """float32 [...], amax / 448: 0 of a row of zeros; inf or NaN of a row that holds one, so that
    every number made of that row shows it."""


def quantize_rows(x: torch.Tensor) -> Fp8Rows:
    """Quantise [..., K], a floating dtype, with one scale a row; nearest, ties to even."""
    if not uses_triton(x) or x.numel() == 0:
        return _quantize(x)
    written = empty(x.shape, x.device)
    fp8_rows_triton.quantize_rows(x.contiguous(), *written)
    return rounded(written)


def quantize_columns(x: torch.Tensor) -> Fp8Rows:
    """Quantise each column of matrices [..., N, K] and transpose: [..., K, N].

    Of weights the operand of an input gradient, whose product sums over the outputs.
    """
    if not uses_triton(x) or x.numel() == 0:
        return _quantize(x.transpose(-2, -1).contiguous())
    *stack, height, width = x.shape
    written = empty((*stack, width, height), x.device)
    fp8_rows_triton.quantize_columns(x.contiguous(), *written)
    return rounded(written)


def scaled_grouped_mm(
    x_RK: Fp8Rows, weight_ENK: Fp8Rows, ends_E: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Multiply each expert's rows by its transposed weight.

    On a GPU of compute capability 9 or 10 with tensor cores, whose fast accumulation keeps fewer
    bits than float32 (as Transformer Engine's forward products do), and to bfloat16 only;
    elsewhere in float32.

    Args:
        x_RK: [R, K], sorted by expert.
        weight_ENK: [E, N, K].
        ends_E: int32 [E], one past each expert's last row; results of later rows are undefined.
        dtype: of the result.

    Returns:
        [R, N].
    """
    x, weight = x_RK.values, weight_ENK.values
    if len(x) == 0:
        return x_RK.inverse.new_zeros(0, weight.shape[1], dtype=dtype)
    if x.is_cuda:
        return torch._scaled_grouped_mm(
            x,
            weight.transpose(1, 2),  # column-major, which the kernel demands
            x_RK.inverse,
            weight_ENK.inverse,
            offs=ends_E,
            out_dtype=dtype,
            use_fast_accum=True,
        )
    product_RN = F.grouped_mm(x.float(), weight.float().transpose(1, 2), offs=ends_E)
    row_R = torch.arange(len(x), device=x.device)
    expert_R = torch.searchsorted(ends_E.long(), row_R, right=True).clamp(max=len(ends_E) - 1)
    product_RN = product_RN * x_RK.inverse.unsqueeze(1) * weight_ENK.inverse[expert_R]
    return product_RN.to(dtype)


def scaled_mm(x_RK: Fp8Rows, weight_NK: Fp8Rows, dtype: torch.dtype) -> torch.Tensor:
    """Multiply [R, K] by the transposed [N, K]: [R, N]; see `scaled_grouped_mm`."""
    if len(x_RK.values) == 0:
        return x_RK.inverse.new_zeros(0, len(weight_NK.values), dtype=dtype)
    if x_RK.values.is_cuda:
        return torch._scaled_mm(
            x_RK.values,
            weight_NK.values.t(),
            scale_a=x_RK.inverse.unsqueeze(1),
            scale_b=weight_NK.inverse.unsqueeze(0),
            out_dtype=dtype,
            use_fast_accum=True,
        )
    product_RN = x_RK.values.float() @ weight_NK.values.float().t()
    return (product_RN * x_RK.inverse.unsqueeze(1) * weight_NK.inverse).to(dtype)


def empty(shape: tuple[int, ...], device: torch.device) -> Fp8Rows:
    """Return memory that a kernel fills; interpreted, of unrounded values.

    Triton's interpreter (3.6) does not round to the nearest FP8 number; kernels round to the dtype
    of the memory that they are given.
    """
    dtype = torch.float32 if is_interpreted() else DTYPE
    values = torch.empty(shape, dtype=dtype, device=device)
    return Fp8Rows(values, torch.empty(shape[:-1], device=device))


def rounded(written: Fp8Rows) -> Fp8Rows:
    """Return what a kernel wrote into `empty`."""
    return Fp8Rows(written.values.to(DTYPE), written.inverse)


def _quantize(x: torch.Tensor) -> Fp8Rows:
    amax = x.abs().amax(-1).float() if x.shape[-1] else x.new_zeros(x.shape[:-1]).float()
    usable = (amax > 0) & (amax <= _LARGEST_FLOAT)
    factor = torch.where(
        usable, (torch.full_like(amax, _LIMIT) / amax).clamp(max=_LARGEST_FLOAT), 1.0
    )
    return Fp8Rows((x.float() * factor.unsqueeze(-1)).to(DTYPE), amax / _LIMIT)
