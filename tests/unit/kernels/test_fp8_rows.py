"""Quantised rows and columns against float64, and their products; torch and Triton kernels."""

import pytest
import torch

from moetron.moe.kernels.fp8_rows import (
    DTYPE,
    Fp8Rows,
    quantize_columns,
    quantize_rows,
    scaled_grouped_mm,
    scaled_mm,
)
from tests.unit.kernels.interpreter import rerun_interpreted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RESULT = torch.bfloat16 if DEVICE == "cuda" else torch.float32  # of products
E4M3 = torch.arange(256, dtype=torch.uint8).view(DTYPE).double()
FINITE = E4M3[E4M3.isfinite()]


def _wide(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return numbers of many magnitudes; the first row is zeros."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.randn(shape, generator=generator).mul(3).exp()
    x = torch.randn(shape, generator=generator) * size
    x.view(-1, shape[-1])[0] = 0
    return x.to(DEVICE)


def _ends(*ends: int) -> torch.Tensor:
    return torch.tensor(ends, dtype=torch.int32, device=DEVICE)


def _values(rows: Fp8Rows) -> torch.Tensor:
    return rows.values.double() * rows.inverse.double().unsqueeze(-1)


def _nearest(x: torch.Tensor) -> torch.Tensor:
    """Round to E4M3 by comparing with all its numbers; ties to the even mantissa."""
    distance = (x.cpu().unsqueeze(-1) - FINITE).abs()
    nearest = distance.min(-1, keepdim=True).values
    codes = torch.arange(256)[E4M3.isfinite()]
    even_first = distance.where(distance == nearest, torch.inf) + (codes % 2) * 1e-12
    return FINITE[even_first.argmin(-1)].to(DEVICE)


@pytest.mark.parametrize("shape", [(20, 64), (5, 48), (1, 1), (3, 7, 130), (2, 1500)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_are_rounded_to_the_nearest_number(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Widths that are no powers of two; several rows a program."""
    x = _wide(*shape).to(dtype)
    rows = quantize_rows(x)
    amax = x.double().abs().amax(-1)
    torch.testing.assert_close(rows.inverse.double(), amax / 448, rtol=1e-7, atol=0)
    factor = torch.where(amax > 0, 448 / amax, 1.0).float().unsqueeze(-1)
    assert torch.equal(rows.values.double(), _nearest((x.float() * factor).double()))
    zero = amax == 0
    assert rows.values.double().abs().amax(-1).eq(448).logical_xor(zero).all()
    assert rows.inverse[zero].eq(0).all() and zero.any()


def test_ties_go_to_the_even_mantissa() -> None:
    """17 is between 16 and 18, 19 between 18 and 20: both mantissas of 16 and 20 are even."""
    x = torch.tensor([[448.0, 17.0, -19.0]], device=DEVICE)
    assert quantize_rows(x).values.tolist() == [[448, 16, -20]]


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_row_that_is_not_finite_shows_in_all_its_products(bad: float) -> None:
    x = torch.ones(3, 16, device=DEVICE)
    x[1, 5] = bad
    rows = quantize_rows(x)
    assert rows.inverse.isfinite().tolist() == [True, False, True]
    weight = quantize_rows(torch.ones(2, 16, 16, device=DEVICE))
    product = scaled_grouped_mm(rows, weight, _ends(2, 3), RESULT)
    assert product.isfinite().all(1).tolist() == [True, False, True]
    assert not product[1].isfinite().any()
    columns = quantize_columns(x)
    assert columns.inverse.isfinite().tolist() == [column != 5 for column in range(16)]
    assert columns.inverse[5].isnan() == torch.tensor(bad).isnan()


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    rows = quantize_rows(torch.zeros(shape, device=DEVICE))
    assert rows.values.shape == shape and rows.inverse.shape == shape[:-1]


def test_tiny_rows_stay_finite() -> None:
    """448 / amax overflows: the row becomes zeros."""
    rows = quantize_rows(torch.full((1, 4), 1e-42, device=DEVICE))
    assert _values(rows).isfinite().all()


@pytest.mark.parametrize("shape", [(3, 40, 24), (2, 150, 130), (24, 5)], ids=str)
def test_columns_are_the_rows_of_the_transposed_matrices(shape: tuple[int, ...]) -> None:
    """One tile; several in both directions; a single matrix."""
    weight = _wide(*shape)
    columns, expected = quantize_columns(weight), quantize_rows(weight.transpose(-2, -1))
    assert torch.equal(columns.values.double(), expected.values.double())
    assert torch.equal(columns.inverse, expected.inverse)
    assert columns.values.is_contiguous() and columns.values.shape == weight.mT.shape


def test_products_multiply_what_the_numbers_stand_for() -> None:
    """The second expert has no rows."""
    x, weight = quantize_rows(_wide(9, 64)), quantize_rows(_wide(3, 32, 64, seed=1))
    product = scaled_grouped_mm(x, weight, _ends(4, 4, 9), RESULT)
    matrices = _values(weight)[torch.tensor([0] * 4 + [2] * 5)]
    expected = torch.einsum("rk,rnk->rn", _values(x), matrices)
    error = (product.double() - expected).norm() / expected.norm()
    assert product.dtype == RESULT and error < (1e-2 if DEVICE == "cuda" else 1e-6)
    one = scaled_mm(x, Fp8Rows(weight.values[2], weight.inverse[2]), RESULT)
    torch.testing.assert_close(one[4:], product[4:])


def test_rows_after_the_last_experts_change_nothing() -> None:
    x, weight = quantize_rows(_wide(9, 16)), quantize_rows(_wide(2, 16, 16, seed=1))
    product = scaled_grouped_mm(x, weight, _ends(3, 6), RESULT)
    fewer = Fp8Rows(x.values[:6], x.inverse[:6])
    assert torch.equal(product[:6], scaled_grouped_mm(fewer, weight, _ends(3, 6), RESULT))


def test_in_the_interpreter() -> None:
    rerun_interpreted(__file__)
