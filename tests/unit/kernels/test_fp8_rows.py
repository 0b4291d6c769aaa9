"""Quantised rows and columns, against float64 and in Triton's interpreter, and their products."""

import importlib.util

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

INTERPRETED = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or torch.cuda.is_available(),
    reason="needs triton, to interpret kernels on a CPU",
)
E4M3 = torch.arange(256, dtype=torch.uint8).view(DTYPE).double()
FINITE = E4M3[E4M3.isfinite()]


def _wide(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return numbers of many magnitudes; the first row is zeros."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.randn(shape, generator=generator).mul(3).exp()
    x = torch.randn(shape, generator=generator) * size
    x.view(-1, shape[-1])[0] = 0
    return x


def _values(rows: Fp8Rows) -> torch.Tensor:
    return rows.values.double() * rows.inverse.double().unsqueeze(-1)


def _nearest(x: torch.Tensor) -> torch.Tensor:
    """Round to E4M3 by comparing with all its numbers; ties to the even mantissa."""
    distance = (x.unsqueeze(-1) - FINITE).abs()
    nearest = distance.min(-1, keepdim=True).values
    codes = torch.arange(256)[E4M3.isfinite()]
    even_first = distance.where(distance == nearest, torch.inf) + (codes % 2) * 1e-12
    return FINITE[even_first.argmin(-1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_rounded_to_the_nearest_number(dtype: torch.dtype) -> None:
    x = _wide(20, 64).to(dtype)
    rows = quantize_rows(x)
    amax = x.double().abs().amax(-1)
    torch.testing.assert_close(rows.inverse.double(), amax / 448, rtol=1e-7, atol=0)
    factor = torch.where(amax > 0, 448 / amax, 1.0).float().unsqueeze(-1)
    assert torch.equal(rows.values.double(), _nearest((x.float() * factor).double()))
    assert rows.values[1:].double().abs().amax(-1).eq(448).all()
    assert rows.inverse[0] == 0 and rows.values[0].double().eq(0).all()


def test_ties_go_to_the_even_mantissa() -> None:
    """17 is between 16 and 18, 19 between 18 and 20: both mantissas of 16 and 20 are even."""
    assert quantize_rows(torch.tensor([[448.0, 17.0, -19.0]])).values.tolist() == [[448, 16, -20]]


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_row_that_is_not_finite_shows_in_all_its_products(bad: float) -> None:
    x = torch.ones(3, 16)
    x[1, 5] = bad
    rows = quantize_rows(x)
    assert rows.inverse.isfinite().tolist() == [True, False, True]
    weight = quantize_rows(torch.ones(2, 16, 16))
    product = scaled_grouped_mm(rows, weight, torch.tensor([2, 3], dtype=torch.int32), x.dtype)
    assert product.isfinite().all(1).tolist() == [True, False, True]
    assert not product[1].isfinite().any()


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    rows = quantize_rows(torch.zeros(shape))
    assert rows.values.shape == shape and rows.inverse.shape == shape[:-1]


def test_tiny_rows_stay_finite() -> None:
    """448 / amax overflows: the row becomes zeros."""
    rows = quantize_rows(torch.full((1, 4), 1e-42))
    assert _values(rows).isfinite().all()


def test_columns_are_the_rows_of_the_transposed_matrices() -> None:
    weight = _wide(3, 40, 24)
    columns, expected = quantize_columns(weight), quantize_rows(weight.transpose(1, 2))
    assert torch.equal(columns.values.double(), expected.values.double())
    assert torch.equal(columns.inverse, expected.inverse)
    assert columns.values.is_contiguous() and columns.values.shape == (3, 24, 40)


def test_products_multiply_what_the_numbers_stand_for() -> None:
    """The second expert has no rows."""
    x, weight = quantize_rows(_wide(9, 16)), quantize_rows(_wide(3, 32, 16, seed=1))
    ends = torch.tensor([4, 4, 9], dtype=torch.int32)
    product = scaled_grouped_mm(x, weight, ends, torch.float32)
    matrices = _values(weight)[torch.tensor([0] * 4 + [2] * 5)]
    expected = torch.einsum("rk,rnk->rn", _values(x), matrices)
    torch.testing.assert_close(product.double(), expected, rtol=1e-5, atol=1e-4)
    one = scaled_mm(x, Fp8Rows(weight.values[2], weight.inverse[2]), torch.float32)
    torch.testing.assert_close(one[4:], product[4:])
    assert scaled_grouped_mm(x, weight, ends, torch.bfloat16).dtype == torch.bfloat16


@INTERPRETED
@pytest.mark.parametrize("shape", [(5, 48), (3, 70, 130), (1, 1), (40, 16), (2, 5000)])
def test_kernels_equal_torch_bit_by_bit(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Widths that are no powers of two, several rows a program, several tiles of columns."""
    x = _wide(*shape)
    x.view(-1, shape[-1])[-1, 0] = torch.inf if shape[0] == 5 else 1.0
    matrices = x if x.dim() == 3 else x.unsqueeze(0)
    expected = quantize_rows(x), quantize_columns(matrices)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for got, wanted in zip((quantize_rows(x), quantize_columns(matrices)), expected, strict=True):
        assert torch.equal(got.inverse, wanted.inverse)
        finite = wanted.inverse.isfinite()
        assert torch.equal(got.values[finite].double(), wanted.values[finite].double())


@INTERPRETED
def test_kernels_keep_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(4, 16)
    x[2, 3] = torch.nan
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert quantize_rows(x).inverse.isnan().tolist() == [False, False, True, False]
    assert quantize_columns(x.unsqueeze(0)).inverse.isnan().sum() == 1
