"""Products of FP8 tensor cores, as their reference on a CPU computes them, and weight copies."""

import pytest
import torch

from moetron.moe.numerics.fp8_emulation import Fp8Numerics
from moetron.moe.numerics.fp8_matmul import Fp8Product
from moetron.moe.numerics.scaled_matmul import (
    ScaledProduct,
    ScaledWeight,
    expire_weights,
    fp8_product,
)


def _error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).detach().float().norm() / wanted.detach().float().norm())


def _operands(rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 64, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(48, 64, generator=generator).to(dtype).requires_grad_()
    return x, weight, torch.randn(rows, 48, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_near_the_plain_one_and_its_weight_gradient_equal(dtype: torch.dtype) -> None:
    x, weight, grad = _operands(130, dtype)
    y, plain = ScaledProduct()(x, weight), x @ weight.t()
    dx, dweight = torch.autograd.grad(y, (x, weight), grad)
    plain_dx, plain_dweight = torch.autograd.grad(plain, (x, weight), grad)
    assert {t.dtype for t in (y, dx, dweight)} == {dtype}
    assert 0.005 < _error(y, plain) < 0.06
    assert 0.005 < _error(dx, plain_dx) < 0.06
    torch.testing.assert_close(dweight, plain_dweight)


def test_a_product_by_hand() -> None:
    """All scales are 1 along the axis that each product sums over: 17 -> 16, 19 -> 20, 9 -> 9."""
    x = torch.tensor([[448.0, 17.0], [17.0, 448.0]], requires_grad=True)
    weight = torch.tensor([[19.0, 448.0], [448.0, 19.0]], requires_grad=True)
    y = ScaledProduct()(x, weight)
    y.backward(torch.tensor([[448.0, 9.0], [9.0, 448.0]]))
    near, far = 448.0 * 20 + 16 * 448, 448.0 * 448 + 16 * 20
    assert y.tolist() == [[near, far], [far, near]]
    assert x.grad is not None and weight.grad is not None
    near, far = 448.0 * 20 + 9 * 448, 448.0 * 448 + 9 * 20
    assert x.grad.tolist() == [[near, far], [far, near]]
    near, far = 448.0 * 448 + 9 * 17, 448.0 * 17 + 9 * 448
    assert weight.grad.tolist() == [[near, far], [far, near]]


def test_a_token_does_not_depend_on_others() -> None:
    x, weight, _ = _operands(2, torch.float32)
    alone = ScaledProduct()(x[:1], weight)
    with torch.no_grad():
        x[1] *= 1e6
    assert torch.equal(ScaledProduct()(x, weight)[:1], alone)


def test_no_rows_give_zero_gradients() -> None:
    x, weight, grad = _operands(0, torch.float32)
    y = ScaledProduct()(x, weight)
    dx, dweight = torch.autograd.grad(y, (x, weight), grad)
    assert y.shape == (0, 48) and dx.shape == (0, 64) and dweight.eq(0).all()


def test_copies_hold_until_the_weight_is_written() -> None:
    weight = torch.nn.Parameter(torch.randn(2, 16, 32))
    copies = ScaledWeight()
    rows, columns = copies.rows(weight), copies.columns(weight)
    assert copies.rows(weight) is rows and copies.columns(weight) is columns
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=1.0).step()
    assert copies.columns(weight) is not columns and copies.rows(weight) is not rows
    copies.rows(weight)
    with torch.no_grad():
        weight.copy_(torch.zeros_like(weight))  # as a checkpoint is loaded
    assert copies.rows(weight).inverse.eq(0).all()
    weight.data.fill_(1.0)  # invisible
    assert copies.rows(weight).inverse.eq(0).all()
    copies.expire()
    assert copies.rows(weight).inverse.gt(0).all()


def test_copies_of_a_model_expire() -> None:
    product = ScaledProduct()
    weight = torch.ones(16, 16)
    rows = product.copies.rows(weight)
    expire_weights([torch.nn.Sequential(torch.nn.Identity(), product)])
    assert product.copies.rows(weight) is not rows
    assert not product.state_dict()


def test_odd_widths_are_emulated() -> None:
    numerics = Fp8Numerics("tensorwise", on_tensor_cores=True)
    assert isinstance(fp8_product(numerics, 48, 64), ScaledProduct)
    assert isinstance(fp8_product(numerics, 48, 60), Fp8Product)
    assert isinstance(fp8_product(Fp8Numerics("tensorwise"), 48, 64), Fp8Product)
