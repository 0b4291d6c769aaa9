"""Rules on experts, routing, capacity and dispatch, each triggered alone."""

from typing import Any

import pytest

from tests.unit.config.config_cases import found

SIGMOID = {"moe_router_score_function": "sigmoid"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"world_size": 3, "expert_model_parallel_size": 3, "global_batch_size": 18},
            "--num-experts 8 is not a multiple of --expert-model-parallel-size 3: use "
            "--num-experts 6 or 9, or --expert-model-parallel-size 2 or 4",
        ),
        (
            {"num_experts": None, "world_size": 2, "expert_model_parallel_size": 2},
            "--expert-model-parallel-size 2 needs --num-experts: add it or use "
            "--expert-model-parallel-size 1",
        ),
        (
            {"num_experts": None, "moe_ffn_hidden_size": 8},
            "--moe-ffn-hidden-size 8 needs --num-experts",
        ),
        (
            {"num_experts": None, "moe_router_enable_expert_bias": True},
            "--moe-router-enable-expert-bias needs --num-experts: add it or leave this out",
        ),
        ({"moe_router_topk": 9}, "--moe-router-topk 9 exceeds --num-experts 8"),
        ({"moe_layer_freq": [1, 0]}, "--moe-layer-freq lists 2 layers, but --num-layers 4"),
        ({"moe_layer_freq": [0, 0, 0, 0]}, "--moe-layer-freq 0 0 0 0 and"),
        (
            {"moe_layer_freq": 5, "moe_layer_position": "last"},
            "--moe-layer-freq 5 and --moe-layer-position last and --first-k-dense-replace 0 give "
            "no layer experts",
        ),
        ({"first_k_dense_replace": 4}, "--first-k-dense-replace 4 give no layer experts"),
        ({"moe_layer_position": "last"}, "has no effect without --moe-layer-freq N above 1"),
        (
            {"moe_layer_position": "last", "moe_layer_freq": [1, 1, 1, 1]},
            "has no effect without --moe-layer-freq N above 1",
        ),
        (
            {"first_k_dense_replace": 1, "moe_layer_freq": [1, 1, 1, 1]},
            "--first-k-dense-replace 1 has no effect with a list of layers",
        ),
        ({"moe_router_topk": 1}, "--moe-router-topk 1 needs --moe-router-pre-softmax"),
        (
            {"moe_router_pre_softmax": True, **SIGMOID},
            "--moe-router-pre-softmax needs --moe-router-score-function softmax",
        ),
        (
            {"moe_router_enable_expert_bias": True},
            "--moe-router-enable-expert-bias needs --moe-router-score-function sigmoid",
        ),
        (
            {"moe_router_load_balancing_type": "sinkhorn", "moe_aux_loss_coeff": 0.1},
            "sinkhorn has no balance loss",
        ),
        (
            {"moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.1},
            "has no effect with",
        ),
        (
            {"moe_router_load_balancing_type": "sinkhorn", "moe_expert_capacity_factor": 1.0},
            "is incompatible with --moe-router-load-balancing-type sinkhorn",
        ),
        (
            {
                "moe_router_load_balancing_type": "sinkhorn",
                "moe_router_num_groups": 2,
                "moe_router_group_topk": 1,
            },
            "sinkhorn does not support groups",
        ),
        (
            {"moe_global_aux_loss_counts": "previous_step"},
            "--moe-global-aux-loss-counts previous_step needs "
            "--moe-router-load-balancing-type global_aux_loss",
        ),
        ({"moe_capacity_scope": "sequence"}, "--moe-capacity-scope sequence needs --moe-expert"),
        (
            {"moe_expert_capacity_factor": 0.06, "moe_capacity_includes_topk": False},
            "--moe-expert-capacity-factor 0.06 leaves an expert no slot: round(0.06 x 64 tokens of "
            "a micro-batch / 8 experts) is 0; use a factor above 0.0625",
        ),
        (
            {
                "moe_expert_capacity_factor": 0.12,
                "moe_capacity_includes_topk": False,
                "moe_capacity_scope": "sequence",
            },
            "round(0.12 x 32 tokens of a sequence / 8 experts) is 0",
        ),
        (
            {
                "world_size": 2,
                "context_parallel_size": 2,
                "moe_expert_capacity_factor": 0.12,
                "moe_capacity_includes_topk": False,
                "moe_capacity_scope": "rank",
            },
            "round(0.12 x 32 tokens of a rank / 8 experts) is 0",
        ),
        (
            {
                "moe_expert_capacity_factor": 1.0,
                "moe_eval_capacity_factor": 0.06,
                "moe_capacity_includes_topk": False,
            },
            "--moe-eval-capacity-factor 0.06 leaves an expert no slot",
        ),
        (
            {
                "world_size": 2,
                "context_parallel_size": 2,
                "moe_expert_capacity_factor": 1.0,
                "moe_pad_expert_input_to_capacity": True,
            },
            "above 1 needs slots for each rank: use --moe-capacity-scope rank",
        ),
        ({"moe_router_num_groups": 2}, "go together"),
        (
            {"moe_router_num_groups": 3, "moe_router_group_topk": 1},
            "--num-experts 8 is not a multiple of --moe-router-num-groups 3",
        ),
        (
            {"moe_router_num_groups": 2, "moe_router_group_topk": 4, "moe_router_topk": 4},
            "--moe-router-group-topk 4 exceeds --moe-router-num-groups 2",
        ),
        (
            {"moe_router_num_groups": 4, "moe_router_group_topk": 3},
            "--moe-router-topk 2 must be a multiple of --moe-router-group-topk 3",
        ),
        (
            {"moe_router_num_groups": 4, "moe_router_group_topk": 1, "moe_router_topk": 4},
            "exceeds the 2 experts of 1 groups",
        ),
        ({"moe_pad_expert_input_to_capacity": True}, "needs --moe-expert-capacity-factor"),
        ({"moe_eval_capacity_factor": 2.0}, "needs --moe-expert-capacity-factor"),
        ({"moe_minimum_capacity": 4}, "--moe-minimum-capacity 4 needs --moe-expert-capacity"),
        ({"moe_capacity_includes_topk": False}, "needs --moe-expert-capacity-factor"),
        ({"moe_token_drop_policy": "position"}, "needs --moe-expert-capacity-factor"),
        (
            {"world_size": 2, "expert_model_parallel_size": 2, "moe_token_dispatcher_type": "flex"},
            "flex needs a CUDA device",
        ),
        (
            {
                "world_size": 2,
                "expert_model_parallel_size": 2,
                "moe_token_dispatcher_type": "flex",
                "device": "cuda",
            },
            "flex needs the package deep_ep",
        ),
        (
            {"moe_shared_expert_overlap": True, "device": "cuda"},
            "needs --moe-shared-expert-intermediate-size",
        ),
        (
            {"moe_shared_expert_overlap": True, "moe_shared_expert_intermediate_size": 8},
            "needs a CUDA device",
        ),
        (
            {
                "moe_shared_expert_overlap": True,
                "moe_shared_expert_intermediate_size": 8,
                "device": "cuda",
                "moe_token_dispatcher_type": "allgather",
            },
            "needs --moe-token-dispatcher-type alltoall",
        ),
    ],
)
def test_rule(changes: dict[str, Any], expected: str) -> None:
    (line,) = found(**changes)
    assert expected in line


def test_flex_with_deep_ep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "deep_ep")
    flex = {"moe_token_dispatcher_type": "flex", "device": "cuda"}
    assert not found(world_size=2, expert_model_parallel_size=2, **flex)
    (problem,) = found(**flex)
    assert "flex needs --expert-model-parallel-size" in problem


def test_padding_of_shared_capacity_needs_allgather() -> None:
    padded = {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True}
    for layout in ({"tensor_model_parallel_size": 2}, {"context_parallel_size": 2}):
        assert found(2, **padded, **layout)
        assert not found(2, **padded, **layout, moe_token_dispatcher_type="allgather")


@pytest.mark.parametrize(
    "changes",
    [
        {"moe_expert_capacity_factor": 0.063, "moe_capacity_includes_topk": False},
        {"moe_expert_capacity_factor": 0.001},  # rounded up
        {
            "moe_expert_capacity_factor": 0.01,
            "moe_capacity_includes_topk": False,
            "moe_minimum_capacity": 4,
        },
    ],
)
def test_a_capacity_of_one_is_enough(changes: dict[str, Any]) -> None:
    assert found(**changes) == []
