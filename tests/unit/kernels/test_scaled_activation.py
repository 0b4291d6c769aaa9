"""Activations in FP8 against those that are quantised afterwards; torch and Triton kernels."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from moetron.moe.kernels import scaled_activation
from moetron.moe.kernels.activation import Activation
from moetron.moe.kernels.fp8_rows import Fp8Rows, quantize_rows
from tests.unit.kernels.interpreter import rerun_interpreted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _assert_near(got: Fp8Rows, wanted: Fp8Rows) -> None:
    """Sums in another order may change a float32, and so the choice between two FP8 numbers."""
    assert got.values.dtype == torch.float8_e4m3fn
    torch.testing.assert_close(got.inverse, wanted.inverse, rtol=1e-5, atol=1e-12)
    codes = (got.values.view(torch.uint8).int() - wanted.values.view(torch.uint8).int()).abs()
    assert codes.max() <= 1 and codes.float().mean() < 0.01


@pytest.mark.parametrize("rows_width", [(5, 24), (3, 600), (7, 16)], ids=str)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("function", [F.silu, F.gelu, F.relu, F.softplus])  # no kernel: the last
def test_equals_the_quantised_activation(
    function: Callable[[torch.Tensor], torch.Tensor], gated: bool, rows_width: tuple[int, int]
) -> None:
    """A row's weight may be 0, and its gradient."""
    torch.manual_seed(3)
    rows, width = rows_width
    hidden = 3 * torch.randn(rows, (2 if gated else 1) * width, device=DEVICE)
    weight, grad = torch.rand(rows, device=DEVICE), torch.randn(rows, width, device=DEVICE)
    weight[1] = 0
    activation = Activation(function, gated)
    plain = activation.forward(hidden, weight)
    _assert_near(scaled_activation.forward(activation, hidden, weight), quantize_rows(plain))
    grad_hidden, quantized, grad_weight, again = scaled_activation.backward(
        activation, grad, hidden, weight
    )
    expected = activation.backward(grad, hidden, weight)
    for mine, other in zip((grad_hidden, grad_weight, again), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-4)
    _assert_near(quantized, quantize_rows(grad_hidden))


def test_no_rows() -> None:
    activation, nothing = Activation(F.silu, True), torch.zeros(0, 32, device=DEVICE)
    weight = torch.zeros(0, device=DEVICE)
    assert scaled_activation.forward(activation, nothing, weight).values.shape == (0, 16)
    found = scaled_activation.backward(activation, nothing[:, :16], nothing, weight)
    assert found[0].shape == found[1].values.shape == (0, 32)


@pytest.mark.skipif(DEVICE == "cpu", reason="kernels keep bfloat16 rows in float32 until then")
def test_bfloat16_rows_are_rounded_once() -> None:
    hidden = torch.randn(64, 256, device=DEVICE).bfloat16()
    weight = torch.rand(64, device=DEVICE)
    activation = Activation(F.silu, True)
    exact = activation.forward(hidden.float(), weight)
    _assert_near(scaled_activation.forward(activation, hidden, weight), quantize_rows(exact))


def test_in_the_interpreter() -> None:
    rerun_interpreted(__file__)
