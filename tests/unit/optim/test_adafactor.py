"""Adafactor against torch's, on unsharded parameters."""

import pytest
import torch

from moetron.moe.optim.adafactor import Adafactor


def _gradients(shape: tuple[int, ...], steps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator) for _ in range(steps)]


def _train(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, steps: int = 6) -> None:
    for grad in _gradients(tuple(parameter.shape), steps):
        parameter.grad = grad.clone()
        optimizer.step()


@pytest.mark.parametrize("shape", [(6, 4), (7,)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_equals_torch(shape: tuple[int, ...], decay: float) -> None:
    """While the learning rate stays below torch's cap of 1 / sqrt(t)."""
    ours = torch.linspace(-1, 2, torch.Size(shape).numel()).view(shape).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    group = {"params": [ours], "lr": 0.02, "weight_decay": decay}
    _train(Adafactor([group], {}, min_factored=2), ours)
    _train(torch.optim.Adafactor([theirs], lr=0.02, weight_decay=decay), theirs)
    torch.testing.assert_close(ours, theirs)


def test_experts_are_separate_matrices() -> None:
    stacked = torch.randn(3, 6, 4)
    single = stacked[1].clone().requires_grad_()
    stacked.requires_grad_()
    one, many = ({"params": [parameter], "lr": 0.02} for parameter in (single, stacked))
    _train(Adafactor([many], {}, min_factored=2), stacked)
    optimizer = Adafactor([one], {}, min_factored=2)
    for grad in _gradients((3, 6, 4), 6):
        single.grad = grad[1].clone()
        optimizer.step()
    torch.testing.assert_close(stacked[1], single)


def test_small_matrices_have_an_unfactored_moment() -> None:
    parameters = [torch.zeros(shape, requires_grad=True) for shape in ((4, 128, 200), (127, 500))]
    optimizer = Adafactor([{"params": parameters}], {})
    factored, unfactored = parameters
    assert optimizer.moments(factored) == ("exp_avg_sq_row", "exp_avg_sq_col")
    assert optimizer.moments(unfactored) == ("exp_avg_sq",)
    assert optimizer.state_numel(factored) == 4 * (128 + 200)
    _train(optimizer, factored, 1)
    kept = optimizer.state[factored].values()
    assert sum(tensor.numel() for tensor in kept) == optimizer.state_numel(factored)


def test_beta_at_the_first_and_ten_thousandth_step() -> None:
    """Beta is 0, so that the moment is the square; then 0.99937 (t^-0.8)."""
    parameter = torch.ones(2, requires_grad=True)
    optimizer = Adafactor([{"params": [parameter], "lr": 0.0}], {})
    parameter.grad = torch.tensor([2.0, 3.0])
    optimizer.step()
    assert optimizer.state[parameter]["exp_avg_sq"].tolist() == [4.0, 9.0]
    optimizer.param_groups[0]["step"] = 9_999
    parameter.grad = torch.zeros(2)
    optimizer.step()
    share = optimizer.state[parameter]["exp_avg_sq"] / torch.tensor([4.0, 9.0])
    torch.testing.assert_close(share, torch.full((2,), 0.99937), rtol=0, atol=1e-5)
