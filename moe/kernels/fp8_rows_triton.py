"""Triton kernels behind fp8_rows.py; they round to the dtype of ``values``."""
# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl

_MAGNITUDE: tl.constexpr = tl.constexpr(0x7FFFFFFF)  # all bits of a float32 but its sign
_LIMIT: tl.constexpr = tl.constexpr(448.0)  # largest number of E4M3
_LARGEST_FLOAT: tl.constexpr = tl.constexpr(3.4028234663852886e38)

_ELEMENTS = 4096  # that a program of `quantize_rows` holds: several rows where they are short
_COLUMN_TILE = (128, 64)  # rows and columns; a transposed row of it is 128 bytes long


@triton.jit
def magnitude_bits(x):
    """Return |x| (float32) as int32, which orders as numbers do: NaN above inf above the rest.

    Their maximum keeps NaN, unlike ``tl.max`` of floats.
    """
    return x.to(tl.int32, bitcast=True) & _MAGNITUDE


@triton.jit
def scales(amax_bits):
    """Return factor and inverse scale (float32) of rows from the largest of `magnitude_bits`."""
    amax = amax_bits.to(tl.float32, bitcast=True)
    factor = tl.minimum(
        tl.math.div_rn(tl.full(amax.shape, _LIMIT, tl.float32), amax), _LARGEST_FLOAT
    )
    usable = (amax > 0.0) & (amax <= _LARGEST_FLOAT)
    inverse = tl.math.div_rn(amax, tl.full(amax.shape, _LIMIT, tl.float32))
    return tl.where(usable, factor, 1.0), inverse


@triton.jit
def _quantize_rows_kernel(
    x_ptr,
    values_ptr,
    inverse_ptr,
    rows,
    width: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Quantise BLOCK_ROWS rows, which are held in registers: x is read once."""
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK_WIDTH)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    x = tl.load(x_ptr + row[:, None] * width + column[None, :], mask, other=0.0).to(tl.float32)
    factor, inverse = scales(tl.max(magnitude_bits(x), axis=1))
    values = (x * factor[:, None]).to(values_ptr.dtype.element_ty)
    tl.store(values_ptr + row[:, None] * width + column[None, :], values, mask)
    tl.store(inverse_ptr + row, inverse, row < rows)


@triton.jit
def _quantize_columns_kernel(
    x_ptr,
    values_ptr,
    inverse_ptr,
    height: tl.constexpr,
    width: tl.constexpr,
    BLOCK_HEIGHT: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Quantise BLOCK_WIDTH columns of a matrix and write them as rows.

    The second pass over the columns finds them in the L2 cache.
    """
    matrix = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    x_ptr += matrix * height * width
    values_ptr += matrix * height * width
    bits = tl.zeros((BLOCK_WIDTH,), tl.int32)
    for start in range(0, height, BLOCK_HEIGHT):
        row = start + tl.arange(0, BLOCK_HEIGHT)
        mask = (row < height)[:, None] & (column < width)[None, :]
        place = row[:, None].to(tl.int64) * width + column[None, :]
        x = tl.load(x_ptr + place, mask, other=0.0).to(tl.float32)
        bits = tl.maximum(bits, tl.max(magnitude_bits(x), axis=0))
    factor, inverse = scales(bits)
    tl.store(inverse_ptr + matrix * width + column, inverse, column < width)
    for start in range(0, height, BLOCK_HEIGHT):
        row = start + tl.arange(0, BLOCK_HEIGHT)
        mask = (row < height)[:, None] & (column < width)[None, :]
        place = row[:, None].to(tl.int64) * width + column[None, :]
        x = tl.load(x_ptr + place, mask, other=0.0).to(tl.float32)
        values = (x * factor[None, :]).to(values_ptr.dtype.element_ty)
        transposed = column[:, None].to(tl.int64) * height + row[None, :]
        across = (column < width)[:, None] & (row < height)[None, :]
        tl.store(values_ptr + transposed, tl.trans(values), across)


def quantize_rows(x: torch.Tensor, values: torch.Tensor, inverse: torch.Tensor) -> None:
    """Quantise the rows of x [..., K] into ``values`` [..., K] and ``inverse`` [...]."""
    width, rows = x.shape[-1], inverse.numel()
    block_width = triton.next_power_of_2(width)
    block_rows = max(1, min(_ELEMENTS // block_width, 16))
    _quantize_rows_kernel[(triton.cdiv(rows, block_rows),)](
        x,
        values,
        inverse,
        rows,
        width,
        BLOCK_ROWS=block_rows,
        BLOCK_WIDTH=block_width,
        num_warps=warps(block_width),
    )


def quantize_columns(x: torch.Tensor, values: torch.Tensor, inverse: torch.Tensor) -> None:
    """Quantise columns of x [..., N, K] into ``values`` [..., K, N] and ``inverse`` [..., K]."""
    height, width = x.shape[-2:]
    matrices = x.numel() // (height * width)
    tile_height, tile_width = _COLUMN_TILE
    _quantize_columns_kernel[(triton.cdiv(width, tile_width), matrices)](
        x,
        values,
        inverse,
        height,
        width,
        BLOCK_HEIGHT=tile_height,
        BLOCK_WIDTH=tile_width,
        num_warps=4,
    )


def warps(width: int) -> int:
    """Return the warps of a program that holds ``width`` values, a power of two, in registers."""
    return max(4, min(width // 1024, 16))
