"""Routing that looks at more than a rank's tokens, in several layouts against one process."""

from dataclasses import replace
from typing import Any

import pytest

from tests.parallel.steps import Case, assert_same, run

TP, EP, ETP = (
    f"{kind}_parallel_size" for kind in ("tensor_model", "expert_model", "expert_tensor")
)
CP = "context_parallel_size"
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "DP2": (2, {}),
    "EP2": (2, {EP: 2}),
    "TP2": (2, {TP: 2, ETP: 1}),
    "CP2": (2, {CP: 2}),
    "TP2 CP2": (4, {TP: 2, CP: 2, EP: 2, ETP: 1}),
}
LIMITED = {"moe_expert_capacity_factor": 0.75, "moe_aux_loss_coeff": 0.01}
ROUTINGS: dict[str, Case] = {
    "capacity by probability": Case(moe=LIMITED, micro_batch_size=2),
    "capacity of a sequence by position": Case(
        moe={
            **LIMITED,
            "moe_capacity_scope": "sequence",
            "moe_token_drop_policy": "position",
        },
        micro_batch_size=2,
    ),
    "counts of the previous step": Case(
        moe={
            "moe_router_load_balancing_type": "global_aux_loss",
            "moe_global_aux_loss_counts": "previous_step",
            "moe_aux_loss_coeff": 1.0,
        },
        steps=2,
    ),
}


@pytest.fixture(scope="module", params=ROUTINGS)
def routing(request: pytest.FixtureRequest) -> tuple[Case, dict[str, Any]]:
    case = ROUTINGS[request.param]
    return case, run(1, case)


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[pytest.mark.slow] * (" " in name)) for name in LAYOUTS]
)
def test_routing_is_the_same_in_every_layout(
    routing: tuple[Case, dict[str, Any]], layout: str
) -> None:
    case, alone = routing
    ranks, parallel = LAYOUTS[layout]
    result = run(ranks, replace(case, parallel=parallel), alone["weights"])
    assert_same(result, alone)
    assert (result["kept"].sum() < result["chosen"].sum()) == (
        "moe_expert_capacity_factor" in case.moe
    )
