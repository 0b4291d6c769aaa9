"""Routing that depends on tokens of several ranks, in layouts against one process."""

import importlib.util
from dataclasses import replace
from typing import Any

import pytest

from tests.parallel.support.steps import Case, assert_same, run

TP, EP, ETP = (
    f"{kind}_parallel_size" for kind in ("tensor_model", "expert_model", "expert_tensor")
)
CP = "context_parallel_size"
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "TP2 EP2": (2, {TP: 2, EP: 2, ETP: 1}),
    "DP2": (2, {}),
    "EP2": (2, {EP: 2}),
    "TP2": (2, {TP: 2, ETP: 1}),
    "CP2": (2, {CP: 2}),
    "TP2 CP2": (4, {TP: 2, CP: 2, EP: 2, ETP: 1}),
}
EVEN = {"moe_aux_loss_coeff": 0.0}
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
    "capacity of a sequence, first choices first": Case(
        moe={
            **LIMITED,
            "moe_capacity_scope": "sequence",
            "moe_token_drop_policy": "choice",
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
    "first choices only": Case(moe={"moe_aux_loss_first_choice_only": True}),
    "jitter": Case(moe={"moe_input_jitter_eps": 0.1}, steps=2),
    "sigmoid, bias and groups": Case(
        moe={
            "moe_router_pre_softmax": False,
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "moe_router_bias_update_rate": 0.2,
            "moe_router_num_groups": 4,
            "moe_router_group_topk": 2,
        },
        steps=2,
    ),
    "Sinkhorn": Case(moe={"moe_router_load_balancing_type": "sinkhorn", **EVEN}),
    "expert choice": Case(
        moe={"moe_router_type": "expert_choice", "moe_expert_capacity_factor": 1.0, **EVEN},
        micro_batch_size=2,
    ),
    "random second": Case(
        moe={
            "moe_router_type": "random_second",
            "moe_router_pre_softmax": False,
            "moe_expert_capacity_factor": 4.0,
            "moe_second_expert_threshold": 0.9,
        },
        steps=2,
    ),
    "noisy top-k": Case(
        moe={"moe_router_type": "noisy_topk", "moe_router_load_balancing_type": "noisy_load"},
        steps=2,
    ),
    "straight through": Case(moe={"moe_router_type": "straight_through"}),
    "Gumbel": Case(
        moe={
            "moe_router_type": "gumbel",
            "moe_router_temperature": 2.0,
            "moe_router_anneal_samples": 6,
        },
        steps=2,
    ),
    "REINFORCE": Case(
        moe={"moe_router_type": "reinforce", "moe_router_pre_softmax": False},
        micro_batch_size=2,
        steps=2,
    ),
    "hash": Case(
        moe={
            "moe_router_type": "hash",
            "moe_router_pre_softmax": False,
            "moe_aux_loss_coeff": 0.0,
            "moe_z_loss_coeff": None,
        },
    ),
    "output z-loss and a token further ahead": Case(
        model={"output_z_loss_coeff": 0.05, "mtp_num_layers": 1}, micro_batch_size=2
    ),
    "relaxed top-k": Case(moe={"moe_router_type": "relaxed_topk"}),
}
if importlib.util.find_spec("scipy"):
    ROUTINGS["BASE"] = Case(
        moe={
            "moe_router_type": "base",
            "moe_router_topk": 1,
            "moe_router_pre_softmax": False,
            "moe_router_score_function": "sigmoid",
            **EVEN,
        }
    )


@pytest.fixture(scope="module", params=ROUTINGS)
def routing(request: pytest.FixtureRequest) -> tuple[Case, dict[str, Any]]:
    case = ROUTINGS[request.param]
    return case, run(1, case)


@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=[pytest.mark.slow] * (name != "TP2 EP2")) for name in LAYOUTS],
)
def test_routing_is_the_same_in_every_layout(
    routing: tuple[Case, dict[str, Any]], layout: str
) -> None:
    case, one_rank = routing
    ranks, parallel = LAYOUTS[layout]
    result = run(ranks, replace(case, parallel=parallel), one_rank["weights"])
    assert_same(result, one_rank)
    if "moe_router_type" not in case.moe:
        limited = "moe_expert_capacity_factor" in case.moe
        assert (result["kept"].sum() < result["chosen"].sum()) == limited


@pytest.mark.parametrize(
    ("kind", "ranks"),
    [
        ("Gumbel", 1),
        ("hash", 2),
        pytest.param("Gumbel", 2, marks=pytest.mark.slow),
        pytest.param("REINFORCE", 1, marks=pytest.mark.slow),
    ],
)
def test_recomputation_does_not_change_routing(kind: str, ranks: int) -> None:
    """Random draws and token ids, on one process and in a pipeline that recomputes."""
    case = ROUTINGS[kind]
    one_rank = run(1, case)
    recompute = {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
        "pipeline_model_parallel_size": ranks,
    }
    assert_same(run(ranks, replace(case, parallel=recompute), one_rank["weights"]), one_rank)
