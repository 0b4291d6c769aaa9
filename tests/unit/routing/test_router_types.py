"""Routers as modules: gradients against dense formulas, training against evaluation."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from router_cases import BATCH, EXPERTS, HIDDEN, LENGTH, TOKENS, hidden_states, make_router
from router_cases import parallel_state as parallel_state

from moetron.moe.routing.gradient_estimators import top_choices

PRE = {"moe_router_pre_softmax": True}
BASE = {
    "moe_router_type": "base",
    "moe_router_topk": 1,
    "moe_router_score_function": "sigmoid",
}
CHOICE = {"moe_router_type": "expert_choice", "moe_expert_capacity_factor": 1.0, **PRE}


def _relaxed(logits: torch.Tensor) -> torch.Tensor:
    """Return weights that sum to 2 by Newton's method, differentiable by autograd."""
    shift = logits.topk(3, dim=1).values[:, 1:].mean(1, keepdim=True)
    for _ in range(40):
        weights = (logits - shift).sigmoid()
        shift = shift + (weights.sum(1, keepdim=True) - 2) / (weights * (1 - weights)).sum(
            1, keepdim=True
        ).clamp(min=0.05)
    return (logits - shift).sigmoid()


NOISE = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(8))


def _over(x: torch.Tensor, map_TE: torch.Tensor) -> torch.Tensor:
    return x.masked_fill(~map_TE, -torch.inf).softmax(1)


def _sigmoids(x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    return x.sigmoid() / (x.sigmoid() * chosen).sum(1, keepdim=True)


DENSE: dict[str, tuple[dict[str, Any], Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]] = {
    "raw softmax": (PRE, lambda x, chosen: x.softmax(1)),
    "renormalised": ({}, _over),
    "sigmoid": ({"moe_router_score_function": "sigmoid"}, _sigmoids),
    "expert choice": (CHOICE, lambda x, chosen: x.softmax(1)),
    "BASE": (BASE, lambda x, chosen: x.sigmoid()),
    "Sinkhorn": (
        {"moe_router_load_balancing_type": "sinkhorn"},
        lambda x, chosen: x.softmax(1),
    ),
    "random second": (
        {"moe_router_type": "random_second", "moe_expert_capacity_factor": 9.0},
        lambda x, chosen: _over(x, top_choices(x, 2)),
    ),
    "noisy": (
        {"moe_router_type": "noisy_topk"},
        lambda x, chosen: _over(x + NOISE * math.log(2), chosen),
    ),
    "Gumbel": (
        {"moe_router_type": "gumbel", "moe_router_temperature": 2.0, **PRE},
        lambda x, chosen: ((x + NOISE) / 2).softmax(1),
    ),
    "straight through": (
        {"moe_router_type": "straight_through", **PRE},
        lambda x, chosen: 0.5 + x.softmax(1) - x.softmax(1).detach(),
    ),
    "relaxed": ({"moe_router_type": "relaxed_topk"}, lambda x, chosen: _relaxed(x) / 2),
}
"""Settings, and the weight of every expert as a function of logits and choices; k = 2, BASE 1."""


@pytest.mark.parametrize("name", DENSE)
def test_gradients_equal_the_dense_formula(name: str) -> None:
    moe, dense = DENSE[name]
    if name == "BASE":
        pytest.importorskip("scipy")
    router = make_router(**moe)
    if name in ("noisy", "Gumbel"):
        router.draws.normal = router.draws.gumbel = NOISE.view_as  # type: ignore[method-assign, union-attr]
    outputs = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(6))
    hidden = hidden_states().requires_grad_()
    probs, chosen = router(hidden)
    (probs * outputs).sum().backward()
    again = hidden.detach().clone().requires_grad_()
    weight = router.weight.detach().clone().requires_grad_()
    weights = dense(again.view(TOKENS, HIDDEN) @ weight.T, chosen)
    (weights * chosen * outputs).sum().backward()
    torch.testing.assert_close(probs, weights.detach() * chosen, rtol=1e-4, atol=1e-5)
    assert weight.grad is not None and float(weight.grad.abs().max()) > 0.01
    torch.testing.assert_close(router.weight.grad, weight.grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(hidden.grad, again.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("policy", ["probs", "choice", "batch_prioritized"])
def test_full_experts_rank_equal_weights_by_probability(policy: str) -> None:
    limited = {"moe_expert_capacity_factor": 0.5, "moe_token_drop_policy": policy, **PRE}
    plain = make_router(**limited)
    router = make_router(moe_router_type="straight_through", **limited)
    router.load_state_dict(plain.state_dict())
    probs, kept = router(hidden_states())
    assert torch.equal(kept, plain(hidden_states())[1])
    assert kept.sum() < router.chosen.sum()
    assert probs.unique().tolist() == [0, 0.5]


def test_experts_choose_equally_many_tokens() -> None:
    router = make_router(**CHOICE, moe_capacity_scope="sequence")
    _, chosen = router(hidden_states())
    per_sequence = chosen.view(LENGTH, BATCH, EXPERTS).sum(0)
    assert (per_sequence == 2 * LENGTH // EXPERTS).all()
    assert chosen.sum(1).unique().numel() > 1  # tokens get more or fewer experts


def test_expert_choice_depends_on_later_tokens_only_in_training() -> None:
    """An early token's choice changes with a later token only in training."""
    half = LENGTH // 2
    changed = hidden_states()
    changed[half:] *= 50
    for mode, looks_ahead in (("expert_choice", True), ("topk", False)):
        router = make_router(**CHOICE, moe_expert_choice_eval=mode).eval()
        torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(2))
        first, second = (router(x)[1][: half * BATCH] for x in (hidden_states(), changed))
        assert torch.equal(first, second) is not looks_ahead


@pytest.mark.parametrize("kind", ["noisy_topk", "gumbel", "random_second"])
def test_only_training_is_random(kind: str) -> None:
    moe: dict[str, Any] = {"moe_router_type": kind}
    if kind == "gumbel":
        moe.update(PRE)
    if kind == "random_second":
        moe.update(moe_expert_capacity_factor=4.0, moe_second_expert_threshold=0.9)
    router = make_router(**moe)
    first, second = router(hidden_states())[1], router(hidden_states())[1]
    assert not torch.equal(first, second)
    assert router.draws is not None and int(router.draws.micro_batches) == 2
    router.eval()
    assert torch.equal(router(hidden_states())[1], router(hidden_states())[1])
    assert (router(hidden_states())[1].sum(1) == 2).all()


def test_recomputed_pass_draws_the_same() -> None:
    """Pipelines run several micro-batches ahead before they recompute the first."""
    router = make_router(moe_router_type="gumbel", **PRE)
    with torch.no_grad():
        ahead = [router(hidden_states())[0] for _ in range(3)]
    again = [router(hidden_states())[0] for _ in range(3)]
    for first, second in zip(ahead, again, strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(ahead[0], ahead[1])


def test_second_experts_are_used_in_proportion_to_their_weight() -> None:
    """P(second) = min(1, g / 0.5); the best is always used."""
    router = make_router(
        moe_router_type="random_second",
        moe_expert_capacity_factor=9.0,
        moe_second_expert_threshold=0.5,
    )
    logits = torch.tensor([[2.0, 1.0, -9, -9, -9, -9]])
    gates = torch.tensor([2.0, 1.0]).softmax(0)
    passes = 400
    visits = torch.zeros(EXPERTS)
    assert router.draws is not None
    for _ in range(passes):
        router.draws.start(1)
        probs, chosen = router.choose(logits.expand(TOKENS, -1), BATCH)
        visits += chosen.sum(0)
    share = visits / (passes * TOKENS)
    assert share[0] == 1 and float(share[2:].sum()) == 0
    assert float(share[1]) == pytest.approx(float(gates[1]) / 0.5, abs=0.02)
    assert float(probs.amax()) == pytest.approx(float(gates[0]))


def test_noise_starts_at_softplus_of_zero_and_learns() -> None:
    router = make_router(
        moe_router_type="noisy_topk",
        moe_router_load_balancing_type="noisy_load",
        moe_aux_loss_coeff=0.1,
    )
    probs, _ = router(hidden_states())
    assert float(router._spread_TE[0, 0]) == pytest.approx(0.6931472)
    probs.sum().mul(0).backward()  # only the balance loss
    assert float(router.noise_weight.grad.abs().max()) > 0
    assert float(router.weight.grad.abs().max()) > 0


def test_temperature_falls_with_the_samples() -> None:
    router = make_router(
        moe_router_type="gumbel",
        moe_router_temperature=4.0,
        moe_router_final_temperature=1.0,
        moe_router_anneal_samples=4 * BATCH,
        **PRE,
    )
    found = []
    for _ in range(6):
        router(hidden_states())
        found.append(router._temperature(BATCH))
    assert found == pytest.approx([4, 4 / 4**0.25, 2, 4 / 4**0.75, 1, 1])
