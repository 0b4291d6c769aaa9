"""The mathematics of the routers on worked examples."""

import math

import pytest
import torch

from moetron.moe.routing.gradient_estimators import (
    annealed,
    relaxed_topk,
    straight_through,
    top_choices,
)
from moetron.moe.routing.noisy_load import cv_squared, win_probability

LOGITS = torch.tensor([[2.0, 0.0, 1.0, -1.0], [0.5, 3.0, -2.0, 0.0]], dtype=torch.float64)


def test_top_choices() -> None:
    assert top_choices(LOGITS, 2).int().tolist() == [[1, 0, 1, 0], [1, 1, 0, 0]]


def test_straight_through() -> None:
    probs = LOGITS.softmax(1).requires_grad_()
    weights = straight_through(probs, 2)
    assert weights.unique().tolist() == [0.5]
    coefficients = torch.arange(8.0).view(2, 4)
    (weights * coefficients).sum().backward()
    assert probs.grad is not None and torch.equal(probs.grad.float(), coefficients)


def test_annealed() -> None:
    assert annealed(4.0, 1.0, 0.0) == 4
    assert annealed(4.0, 1.0, 0.5) == pytest.approx(2)
    assert annealed(4.0, 1.0, 3.0) == pytest.approx(1)


def test_relaxed_topk_of_two_levels() -> None:
    """Two logits a and two -a: v = 0 by symmetry, so the weights are sigmoid(+-a / t)."""
    a, t = 1.5, 0.5
    weights = relaxed_topk(torch.tensor([[a, -a, a, -a]], dtype=torch.float64), 2, t)
    high, low = 1 / (1 + math.exp(-a / t)), 1 / (1 + math.exp(a / t))
    assert weights[0].tolist() == pytest.approx([high, low, high, low])
    assert relaxed_topk(LOGITS, 4, t).tolist() == [[1.0] * 4] * 2


@pytest.mark.parametrize("topk", [1, 2, 3])
@pytest.mark.parametrize("temperature", [0.3, 2.0])
def test_relaxed_topk_sums_to_k_and_has_its_gradient(topk: int, temperature: float) -> None:
    logits = LOGITS.clone().requires_grad_()
    weights = relaxed_topk(logits, topk, temperature)
    torch.testing.assert_close(weights.sum(1), torch.full((2,), float(topk), dtype=torch.float64))
    assert torch.equal(weights.argsort(1), LOGITS.argsort(1))
    assert torch.autograd.gradcheck(lambda x: relaxed_topk(x, topk, temperature), (logits,))


def test_win_probability() -> None:
    """With h = 3, 1, 2 (k = 1) expert 0 wins while above 2; the others win above 3."""
    clean = torch.tensor([[2.5, 1.0, 2.0]], dtype=torch.float64)
    noisy = torch.tensor([[3.0, 1.0, 2.0]], dtype=torch.float64)
    spread = torch.tensor([[0.5, 1.0, 2.0]], dtype=torch.float64)
    expected = [(2.5 - 2) / 0.5, (1 - 3) / 1, (2 - 3) / 2]
    phi = [0.5 * (1 + math.erf(z / math.sqrt(2))) for z in expected]
    found = win_probability(clean, noisy, spread, 1)
    assert found[0].tolist() == pytest.approx(phi)
    assert win_probability(clean, noisy, spread, 3).tolist() == [[1.0] * 3]


def test_win_probability_equals_the_frequency_of_draws() -> None:
    generator = torch.Generator().manual_seed(1)
    clean, noisy = torch.randn(2, 1, 5, generator=generator)
    spread = torch.rand(1, 5, generator=generator) + 0.2
    again = clean + torch.randn(40_000, 5, generator=generator) * spread
    for expert in range(5):
        h = noisy.repeat(len(again), 1)
        h[:, expert] = again[:, expert]
        share = top_choices(h, 2)[:, expert].double().mean()
        probability = win_probability(clean, noisy, spread, 2)[0, expert]
        assert float(share) == pytest.approx(float(probability), abs=0.01)


def test_cv_squared() -> None:
    assert cv_squared(torch.tensor([2.0, 2.0])) == 0
    assert cv_squared(torch.tensor([1.0, 3.0])) == 1 / 4  # variance 1, mean 2
