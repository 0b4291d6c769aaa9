"""--moe-router-fusion: the router calls megatron-core's fused functions and uses their results."""

import inspect
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe import moe_utils

from tests.unit.host.stand_ins import pretend_kernels
from tests.unit.routing.router_cases import (
    hidden_states,
    make_router,
    parallel_state,  # noqa: F401  (fixture)
)

TOPK = moe_utils.topk_routing_with_score_function
SCORES = moe_utils.compute_routing_scores_for_aux_loss
UNUSED = {"fused", "router_replay", "dense_output", "precomputed_indices"}
"""Of replay, and in 0.19 of inference and of quantile balancing."""
CASES: tuple[dict[str, Any], ...] = (
    {"moe_router_pre_softmax": True, "moe_router_topk_scaling_factor": 2.5},
    {"moe_router_num_groups": 3, "moe_router_group_topk": 2},
    {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
    {"moe_expert_capacity_factor": 1.0, "moe_aux_loss_first_choice_only": True},
)


def _result(fusion: bool, **moe: Any) -> list[torch.Tensor]:
    """Return weights, choices and the router's gradient."""
    torch.manual_seed(0)
    router = make_router(moe_aux_loss_coeff=0.1, **moe)
    router.config.moe_router_fusion = fusion
    weights, chosen = router(hidden_states())
    (weights * torch.arange(weights.numel()).view_as(weights)).sum().backward()
    assert router.weight.grad is not None
    return [weights.detach(), chosen, router.weight.grad]


@pytest.mark.parametrize("moe", CASES)
def test_the_fused_functions_get_all_arguments(
    monkeypatch: pytest.MonkeyPatch, moe: dict[str, Any]
) -> None:
    """Stand-ins that compute the same by megatron-core's unfused functions give equal results."""
    expected = _result(False, **moe)
    pretend_kernels(monkeypatch)
    called = []

    def topk(logits: torch.Tensor, topk: int, **arguments: Any) -> Any:
        called.append("topk")
        wanted = set(inspect.signature(TOPK).parameters) - UNUSED
        assert {"logits", "topk", *arguments} == wanted
        return TOPK(logits, topk, **arguments)

    def scores(logits: torch.Tensor, topk: int, score_function: str) -> Any:
        called.append("scores")
        return SCORES(logits, topk, score_function)

    monkeypatch.setattr(moe_utils, "fused_topk_with_score_function", topk)
    monkeypatch.setattr(moe_utils, "fused_compute_score_for_moe_aux_loss", scores)
    found = _result(True, **moe)
    assert called == ["topk", "scores"]
    assert all(map(torch.equal, found, expected))
