"""Counts of choices in models with 16-bit parameters: exact integers, as in fp32."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.transformer.module import Float16Module
from router_cases import EXPERTS, TOKENS, hidden_states, make_router, make_settings
from router_cases import parallel_state as parallel_state

from moetron.moe.routing.expert_bias import surplus_signs, update_expert_biases
from moetron.moe.routing.router import Router
from moetron.moe.routing.router_types import KINDS
from moetron.moe.routing.routing_record import RoutingRecorder

PASSES = 60  # of 24 tokens: counts far above 256, the limit of exact integers in bf16
BIAS = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
GLOBAL = {"moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": 0.1}
PREVIOUS = {**GLOBAL, "moe_global_aux_loss_counts": "previous_step"}
FORMATS: dict[str, Callable[[torch.nn.Module], torch.nn.Module]] = {
    "fp32": lambda router: router,
    "bf16": torch.nn.Module.bfloat16,
    "fp16": torch.nn.Module.half,
}


@pytest.fixture(params=FORMATS)
def converted(request: pytest.FixtureRequest) -> Callable[..., tuple[Router, torch.Tensor]]:
    """Return a function: router after some passes in a dtype, and their choices, int64 [E]."""

    def make(**moe: Any) -> tuple[Router, torch.Tensor]:
        router = make_router(**moe)
        FORMATS[request.param](router)
        hidden = hidden_states().to(router.weight.dtype)
        chosen_E = torch.zeros(EXPERTS, dtype=torch.int64)
        for _ in range(PASSES):
            router(hidden)
            chosen_E += router.chosen.sum(0)
        assert int(chosen_E.sum()) == 2 * PASSES * TOKENS and int(chosen_E.max()) > 512
        return router, chosen_E

    return make


def test_the_bias_uses_exact_counts(converted: Callable[..., Any]) -> None:
    router, chosen_E = converted(**BIAS)
    assert torch.equal(router.local_tokens_per_expert, chosen_E)
    update_expert_biases([router])
    mean = chosen_E.sum() / EXPERTS
    expected_E = -1e-3 * (chosen_E - mean).sign()
    assert router.expert_bias.dtype == torch.float32
    torch.testing.assert_close(router.expert_bias, expected_E)
    assert not router.local_tokens_per_expert.any()
    update_expert_biases([router])  # no counts since then
    torch.testing.assert_close(router.expert_bias, expected_E)


@pytest.mark.parametrize("moe", [GLOBAL, PREVIOUS], ids=["running", "previous step"])
def test_the_global_loss_uses_exact_counts(
    converted: Callable[..., Any], moe: dict[str, Any]
) -> None:
    router, chosen_E = converted(**moe)
    name = "step_choices" if moe is PREVIOUS else "global_tokens_per_expert"
    assert torch.equal(getattr(router, name), chosen_E)
    router.reset_global_aux_loss_tracker()
    assert not getattr(router, name).any()
    if moe is PREVIOUS:
        assert torch.equal(router.previous_choices, chosen_E)


def test_a_resumed_router_has_the_same_counts(converted: Callable[..., Any]) -> None:
    router, chosen_E = converted(**PREVIOUS, **BIAS)
    update_expert_biases([router])
    router.reset_global_aux_loss_tracker()
    router.expert_bias += 0.30001  # not representable in bf16
    saved = copy.deepcopy(router.state_dict())
    resumed = make_router(**PREVIOUS, **BIAS).to(router.weight.dtype)
    resumed.load_state_dict(saved)
    assert torch.equal(resumed.previous_choices, chosen_E)
    assert torch.equal(resumed.expert_bias, router.expert_bias)
    assert resumed.expert_bias.dtype == torch.float32


def test_evaluation_and_padding_are_not_counted() -> None:
    router = make_router(**BIAS)
    router.eval()(hidden_states())
    with torch.no_grad():
        router.train()(hidden_states())
    assert not router.local_tokens_per_expert.any()
    padding = torch.zeros(hidden_states().shape[:2], dtype=torch.bool)
    padding[5:] = True
    router(hidden_states(), padding)
    assert int(router.local_tokens_per_expert.sum()) == 2 * 5 * padding.shape[1]


@pytest.mark.parametrize("most", [2**8, 2**11, 2**24, 2**33])
def test_signs_are_exact_beyond_float_precision(most: int) -> None:
    """One token above or below the mean, beyond the odd integers of bf16, fp16 and fp32."""
    counts_LE = torch.tensor([[most + 1, most - 1, most], [most, most, most]])
    assert surplus_signs(counts_LE).tolist() == [[1, -1, 0], [0, 0, 0]]


@pytest.mark.parametrize("kind", KINDS)
def test_no_counter_is_a_float(kind: str) -> None:
    """Float buffers of a model are cast to its dtype; only a bias may be one."""
    moe: dict[str, Any] = {"moe_router_type": kind}
    if kind in ("expert_choice", "random_second"):
        moe["moe_expert_capacity_factor"] = 1.0
    if kind in ("topk", "noisy_topk", "random_second", "gumbel", "relaxed_topk"):
        moe |= PREVIOUS
    if kind == "topk":
        moe |= BIAS
    router = make_router(**moe)
    floats = {name for name, buffer in router.named_buffers() if buffer.is_floating_point()}
    assert floats <= {"expert_bias"}


def test_the_recorder_counts_exactly_in_bf16() -> None:
    router = make_router()
    config = router.config
    config.bf16 = True
    wrapped = Float16Module(config, torch.nn.Sequential(router))
    settings = make_settings()
    with RoutingRecorder([wrapped], settings) as recorder:
        for _ in range(PASSES):
            router(hidden_states().bfloat16())
        assert int(recorder.summary().chosen.sum()) == 2 * PASSES * TOKENS
