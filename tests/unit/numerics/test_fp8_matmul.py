"""Products of FP8 operands, against hand-computed and plain products."""

import pytest
import torch

from moetron.moe.numerics.fp8_emulation import Fp8Numerics
from moetron.moe.numerics.fp8_matmul import Fp8Product

RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")


def _ends(*ends: int) -> torch.Tensor:
    return torch.tensor(ends, dtype=torch.int32)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_product_by_hand(recipe: str) -> None:
    """All scales are 1: 17 -> 16, 19 -> 20 in e4m3, 9 -> 8 in e5m2.

    Amaxes are the formats' largest numbers, along the axis that each product sums over; the first
    call of delayed scaling starts from 1.
    """
    product = Fp8Product(Fp8Numerics(recipe, backward=torch.float8_e5m2))
    x = torch.tensor([[448.0, 17.0], [17.0, 448.0]], requires_grad=True)
    weight = torch.tensor([[[19.0, 448.0], [448.0, 19.0]]], requires_grad=True)
    grad = torch.tensor([[57344.0, 9.0], [9.0, 57344.0]])
    y = product(x, weight, _ends(2))
    y.backward(grad)
    near, far = 448.0 * 20 + 16 * 448, 448.0 * 448 + 16 * 20
    assert y.tolist() == [[near, far], [far, near]]
    assert x.grad is not None and weight.grad is not None
    near, far = 57344.0 * 20 + 8 * 448, 57344.0 * 448 + 8 * 20
    assert x.grad.tolist() == [[near, far], [far, near]]
    near, far = 57344.0 * 448 + 8 * 16, 57344.0 * 16 + 8 * 448
    assert weight.grad.tolist() == [[[near, far], [far, near]]]


def test_delayed_scales_follow_one_call_later_and_not_in_evaluation() -> None:
    product = Fp8Product(Fp8Numerics("delayed"))
    weight = torch.full((1, 1, 1), 448.0)
    x = torch.tensor([[0.001]])

    def result() -> float:
        return float(product(x, weight, _ends(1)).detach()) / 448

    with torch.no_grad():
        assert [result(), result()] == [2.0**-9] * 2
    assert result() == 2.0**-9  # scale 1: 0.001 is nearest to the smallest step
    assert result() == pytest.approx(0.001, rel=1e-6)  # scale 448 / 0.001


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_are_independent_and_close_to_plain_products(
    recipe: str, dtype: torch.dtype
) -> None:
    """Three experts, the second without tokens, equal their dense products."""
    generator = torch.Generator().manual_seed(1)
    sizes = (40, 0, 90)
    x = torch.randn(130, 64, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(3, 48, 64, generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(130, 48, generator=generator).to(dtype)
    y = Fp8Product(Fp8Numerics(recipe))(x, weight, _ends(40, 40, 130))
    dx, dweight = torch.autograd.grad(y, (x, weight), grad)
    assert {t.dtype for t in (y, dx, dweight)} == {dtype}
    parts = zip(x.split(sizes), weight, grad.split(sizes), strict=True)
    for expert, (x_part, weight_part, grad_part) in enumerate(parts):
        own = Fp8Product(Fp8Numerics(recipe))(x_part, weight_part[None], _ends(len(x_part)))
        own_dx, own_dweight = torch.autograd.grad(own, (x_part, weight_part), grad_part)
        for ours, alone in (
            (y.split(sizes)[expert], own),
            (dx.split(sizes)[expert], own_dx),
            (dweight[expert], own_dweight),
        ):
            torch.testing.assert_close(ours, alone, rtol=2e-3, atol=1e-4)
    plain = torch.cat([a @ b.t() for a, b in zip(x.split(sizes), weight, strict=True)])
    error = (y - plain).detach().float().norm() / plain.detach().float().norm()
    assert 0.005 < float(error) < 0.06
