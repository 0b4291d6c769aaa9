"""REINFORCE: probabilities, baseline, and an unbiased estimate of the gradient."""

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from router_cases import BATCH, LENGTH, TOKENS, hidden_states, make_router
from router_cases import parallel_state as parallel_state

from moetron.moe.routing.reinforce import ReinforceRouter, _Rewarded, advantages, log_probability

ALONE: Any = SimpleNamespace(size=lambda: 1)
LOGITS = torch.tensor([[1.0, 0.0, -0.5]], dtype=torch.float64)


def test_worked_log_probability() -> None:
    """Weights 1, 2, 3: first the third (3 / 6), then the first of the remaining (1 / 3)."""
    logits = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64).log()
    found = log_probability(logits, torch.tensor([[2, 0]]))
    assert float(found) == pytest.approx(math.log(3 / 6 * 1 / 3))
    orders = torch.tensor(list(itertools.permutations(range(3))))
    probabilities = log_probability(logits.expand(len(orders), -1), orders).exp()
    assert float(probabilities.sum()) == pytest.approx(1)


def test_worked_advantages() -> None:
    """Losses 1, 2, 6 count, 100 does not: others' means are 4, 3.5 and 1.5."""
    losses = torch.tensor([[1.0, 100.0], [2.0, 6.0]])
    mask = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    expected = torch.tensor([[1 - 4, 0], [2 - 3.5, 6 - 1.5]])
    torch.testing.assert_close(advantages(losses, mask, ALONE, True), expected)
    torch.testing.assert_close(advantages(losses, mask, ALONE, False), expected / 3)
    single = advantages(torch.ones(1, 1), torch.ones(1, 1), ALONE, True)
    assert float(single) == 0


def test_estimates_the_gradient_of_the_expected_loss() -> None:
    """Sum over ordered pairs a of P(a) (L(a) - b) grad log P(a) is the gradient of sum P L."""
    orders = torch.tensor(list(itertools.permutations(range(3), 2)))
    losses = torch.linspace(0.5, 3, len(orders), dtype=torch.float64)
    exact = LOGITS.clone().requires_grad_()
    probabilities = log_probability(exact.expand(len(orders), -1), orders).exp()
    (probabilities * losses).sum().backward()
    logits = LOGITS.clone().requires_grad_()
    holder: Any = SimpleNamespace(advantage_T=probabilities.detach() * (losses - 1.7))
    log_prob = log_probability(logits.expand(len(orders), -1), orders)
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    weights: torch.Tensor = _Rewarded.apply(torch.ones(len(orders), 3), log_prob, holder)
    weights.sum().backward()
    torch.testing.assert_close(logits.grad, exact.grad)


def test_router_learns_only_from_rewards() -> None:
    router = make_router(moe_router_type="reinforce")
    assert isinstance(router, ReinforceRouter)
    probs, chosen = router(hidden_states())
    assert (chosen.sum(1) == 2).all() and torch.equal(probs, chosen * 0.5)
    advantage = torch.randn(BATCH, LENGTH, generator=torch.Generator().manual_seed(9))
    router.reward(advantage)
    (probs * 1e3).sum().backward()  # experts' outputs have no effect
    weight = router.weight.detach().clone().requires_grad_()
    logits = hidden_states().view(TOKENS, -1) @ weight.T
    both = [torch.where(chosen)[1].view(TOKENS, 2), torch.where(chosen)[1].view(TOKENS, 2).flip(1)]
    drawn = _drawn_orders(router, logits.detach(), both)
    (advantage.T.flatten() * log_probability(logits, drawn)).sum().backward()
    torch.testing.assert_close(router.weight.grad, weight.grad, rtol=1e-4, atol=1e-5)
    again = router.eval()(hidden_states())[1]
    assert torch.equal(again, router(hidden_states())[1])


def _drawn_orders(
    router: ReinforceRouter, logits: torch.Tensor, both: list[torch.Tensor]
) -> torch.Tensor:
    """Return which of two orders was drawn for each token, from the same noise."""
    assert router.draws is not None
    router.draws.load_state_dict({"micro_batches": torch.zeros(1, dtype=torch.int64)})
    router.draws.start(1)
    noisy = logits + router.draws.gumbel(logits.unflatten(0, (-1, BATCH))).flatten(0, 1)
    first = noisy.gather(1, both[0])
    return torch.where(first[:, :1] > first[:, 1:], both[0], both[1])
