"""Activation of experts against its formula in float64; torch operations and Triton kernels."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from moetron.moe.kernels.activation import Activation
from tests.unit.kernels.interpreter import rerun_interpreted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FUNCTIONS = [F.silu, F.gelu, F.relu, F.softplus]  # the last has no kernel


def _formula(
    function: Callable[[torch.Tensor], torch.Tensor],
    gated: bool,
    hidden: torch.Tensor,
    weight: torch.Tensor,
) -> torch.Tensor:
    width = hidden.shape[1] // 2
    inner = function(hidden[:, :width]) * hidden[:, width:] if gated else function(hidden)
    return inner * weight[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("rows_width", [(5, 24), (1, 1), (3, 5000), (0, 8)], ids=str)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_equals_the_formula(
    function: Callable[[torch.Tensor], torch.Tensor],
    gated: bool,
    rows_width: tuple[int, int],
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(3)
    rows, width = rows_width
    hidden = (3 * torch.randn(rows, (2 if gated else 1) * width, device=DEVICE)).to(dtype)
    weight = torch.rand(rows, device=DEVICE, dtype=torch.promote_types(dtype, torch.float32))
    grad = torch.randn(rows, width, device=DEVICE).to(dtype)
    activation = Activation(function, gated)
    found = [activation.forward(hidden, weight), *activation.backward(grad, hidden, weight)]
    assert [x.dtype for x in found] == [dtype, dtype, weight.dtype, dtype]

    leaves = [x.double().requires_grad_() for x in (hidden, weight)]
    expected = _formula(function, gated, *leaves)
    grads = torch.autograd.grad(expected, leaves, grad.double())
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for mine, other in zip(found, (expected, *grads, expected), strict=True):
        torch.testing.assert_close(
            mine.double(), other.detach(), rtol=tolerance, atol=tolerance * max(1, width**0.5)
        )
    if DEVICE == "cpu":  # a compiler may contract the two differently
        assert torch.equal(found[0], found[3])


def test_the_formula_in_the_dtypes_of_torch_on_a_cpu() -> None:
    """bf16 on a CPU rounds after each operation, as torch does."""
    hidden = torch.randn(4, 16).bfloat16()
    weight = torch.rand(4)
    if Activation(F.silu, True).has_kernel(hidden):
        pytest.skip("kernels round once")
    expected = _formula(F.silu, True, hidden, weight).bfloat16()
    assert torch.equal(Activation(F.silu, True).forward(hidden, weight), expected)


def test_in_the_interpreter() -> None:
    rerun_interpreted(__file__)
