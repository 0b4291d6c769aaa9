"""Products of FP8 tensor cores, as their reference on a CPU computes them, and weight copies."""

import pytest
import torch

from moetron.moe.numerics.scaled_matmul import ScaledProduct, ScaledWeight, expire_weights


def _ends(*ends: int) -> torch.Tensor:
    return torch.tensor(ends, dtype=torch.int32)


def _error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).detach().float().norm() / wanted.detach().float().norm())


def _operands(
    rows: int, experts: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 64, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(experts, 48, 64, generator=generator).to(dtype).requires_grad_()
    return x, weight, torch.randn(rows, 48, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_equal_their_dense_products_within_fp8_error(dtype: torch.dtype) -> None:
    """Three experts, the second without tokens; the weight gradient is not quantised."""
    x, weight, grad = _operands(130, 3, dtype)
    sizes = (40, 0, 90)
    y = ScaledProduct()(x, weight, _ends(40, 40, 130))
    dx, dweight = torch.autograd.grad(y, (x, weight), grad)
    assert {t.dtype for t in (y, dx, dweight)} == {dtype}
    parts = zip(x.split(sizes), weight, strict=True)
    plain = torch.cat([part @ matrix.t() for part, matrix in parts])
    plain_dx, plain_dweight = torch.autograd.grad(plain, (x, weight), grad)
    assert 0.005 < _error(y, plain) < 0.06
    assert 0.005 < _error(dx, plain_dx) < 0.06
    assert _error(dweight, plain_dweight) < (1e-6 if dtype == torch.float32 else 5e-3)
    assert dweight[1].eq(0).all()


def test_one_matrix_equals_an_expert() -> None:
    x, weight, grad = _operands(30, 1, torch.float32)
    two = weight.detach().repeat(2, 1, 1).requires_grad_()
    y, same = ScaledProduct()(x, weight, _ends(30)), ScaledProduct()(x, two, _ends(30, 30))
    torch.testing.assert_close(y, same)
    for got, wanted in zip(
        torch.autograd.grad(y, (x, weight), grad),
        torch.autograd.grad(same, (x, two), grad),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted[:1] if wanted.dim() == 3 else wanted)


def test_a_token_does_not_depend_on_others() -> None:
    x, weight, _ = _operands(2, 1, torch.float32)
    alone = ScaledProduct()(x[:1], weight, _ends(1))
    with torch.no_grad():
        x[1] *= 1e6
    assert torch.equal(ScaledProduct()(x, weight, _ends(2))[:1], alone)


def test_no_rows_give_zero_gradients() -> None:
    x, weight, grad = _operands(0, 3, torch.float32)
    y = ScaledProduct()(x, weight, _ends(0, 0, 0))
    dx, dweight = torch.autograd.grad(y, (x, weight), grad)
    assert y.shape == (0, 48) and dx.shape == (0, 64) and dweight.eq(0).all()


def test_copies_hold_until_the_weight_is_written() -> None:
    weight = torch.nn.Parameter(torch.randn(2, 16, 32))
    copies = ScaledWeight()
    rows, columns = copies.rows(weight), copies.columns(weight)
    assert copies.rows(weight) is rows and copies.columns(weight) is columns
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=1.0).step()
    assert copies.rows(weight) is not rows and copies.columns(weight) is not columns
    rows = copies.rows(weight)
    with torch.no_grad():
        weight.copy_(torch.zeros_like(weight))  # as a checkpoint is loaded
    assert copies.rows(weight).inverse.eq(0).all()
    weight.data.fill_(1.0)  # invisible
    assert copies.rows(weight).inverse.eq(0).all()
    copies.expire()
    assert copies.rows(weight).inverse.gt(0).all()


def test_copies_of_a_model_expire() -> None:
    product = ScaledProduct()
    weight = torch.ones(1, 16, 16)
    rows = product.weight.rows(weight)
    expire_weights([torch.nn.Sequential(torch.nn.Identity(), product)])
    assert product.weight.rows(weight) is not rows
