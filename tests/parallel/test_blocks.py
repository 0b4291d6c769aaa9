"""Blocks other than OLMoE's in every layout against one process: losses and all gradients."""

from dataclasses import replace
from typing import Any

import pytest

from tests.parallel.support.steps import Case, assert_same, run

TP, EP, PP = (f"{kind}_model_parallel_size" for kind in ("tensor", "expert", "pipeline"))
CP, ETP = "context_parallel_size", "expert_tensor_parallel_size"

DEEPSEEK = Case(
    model={"num_query_groups": None, "qk_layernorm_scope": "head", "mtp_num_layers": 1},
    attention={
        "multi_latent_attention": True,
        "q_lora_rank": 12,
        "kv_lora_rank": 8,
        "qk_head_dim": 8,
        "qk_pos_emb_head_dim": 4,
        "v_head_dim": 6,
    },
    moe={
        "moe_layer_freq": [0, 1, 1, 1],
        "moe_router_pre_softmax": False,
        "moe_router_score_function": "sigmoid",
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
        "moe_router_topk": 4,
        "moe_router_topk_scaling_factor": 2.5,
        "moe_router_load_balancing_type": "seq_aux_loss",
        "moe_shared_expert_intermediate_size": 16,
    },
)
QWEN = Case(
    model={"qk_layernorm": False, "qk_layernorm_scope": "head"},
    attention={"add_qkv_bias": True},
    moe={"moe_shared_expert_intermediate_size": 16, "moe_shared_expert_gate": True},
)
OPENMOE = Case(
    model={"qk_layernorm": False, "qk_layernorm_scope": "head", "ffn_type": "double_gated"},
    attention={"softmax_scale": 1.0},
    moe={
        "moe_sequential_ffn_hidden_size": 32,
        "moe_shared_expert_intermediate_size": 16,
        "moe_expert_multiplicative_bias": True,
    },
)
ONE_KEY = Case(
    model={"num_query_groups": 1, "qk_layernorm_scope": "head"}, attention={"add_qkv_bias": True}
)
TWO_KEYS = replace(ONE_KEY, model={**ONE_KEY.model, "num_query_groups": 2})
FAMILIES = {
    **{"deepseek": DEEPSEEK, "qwen": QWEN, "openmoe": OPENMOE},
    **{"one key": ONE_KEY, "two keys": TWO_KEYS},
}


@pytest.fixture(scope="module")
def one_rank() -> dict[str, dict[str, Any]]:
    return {family: run(1, case) for family, case in FAMILIES.items()}


@pytest.mark.parametrize(
    ("family", "ranks", "parallel"),
    [
        pytest.param("deepseek", 2, {TP: 2, EP: 2, ETP: 1}, id="deepseek TP2 EP2"),
        pytest.param("deepseek", 2, {PP: 2}, id="deepseek PP2"),
        pytest.param("deepseek", 2, {CP: 2}, id="deepseek CP2"),
        pytest.param("qwen", 2, {TP: 2, ETP: 1}, id="qwen TP2"),
        pytest.param("openmoe", 2, {TP: 2}, id="openmoe TP2 ETP2"),
        pytest.param("openmoe", 2, {EP: 2}, id="openmoe EP2"),
        pytest.param("one key", 2, {TP: 2, ETP: 1}, id="one key TP2"),
        pytest.param("one key", 4, {TP: 2, CP: 2}, id="one key TP2 CP2", marks=pytest.mark.slow),
        pytest.param("one key", 4, {TP: 4, ETP: 1}, id="one key TP4", marks=pytest.mark.slow),
        pytest.param("two keys", 4, {TP: 4, ETP: 1}, id="two keys TP4", marks=pytest.mark.slow),
        pytest.param("openmoe", 2, {PP: 2}, id="openmoe PP2", marks=pytest.mark.slow),
        pytest.param("qwen", 2, {EP: 2}, id="qwen EP2", marks=pytest.mark.slow),
        pytest.param("deepseek", 2, {EP: 2}, id="deepseek EP2", marks=pytest.mark.slow),
        pytest.param("deepseek", 4, {TP: 2, PP: 2}, id="deepseek TP2 PP2", marks=pytest.mark.slow),
        pytest.param("deepseek", 4, {TP: 2, CP: 2}, id="deepseek TP2 CP2", marks=pytest.mark.slow),
    ],
)
def test_layout_equals_one_process(
    one_rank: dict[str, dict[str, Any]], family: str, ranks: int, parallel: dict[str, int]
) -> None:
    one = one_rank[family]
    assert_same(run(ranks, replace(FAMILIES[family], parallel=parallel), one["weights"]), one)


def test_every_block_has_weights(one_rank: dict[str, dict[str, Any]]) -> None:
    names = one_rank["deepseek"]["weights"].keys()
    for part in ("linear_q_down_proj", "linear_kv_up_proj", "mtp.layers.0.eh_proj"):
        assert any(part in name for name in names), part
    assert any("linear_qkv.bias" in name for name in one_rank["qwen"]["weights"])
    assert any("extra_mlp.linear_fc1_linear" in name for name in one_rank["openmoe"]["weights"])
    assert any("shared_experts.gate_weight" in name for name in one_rank["qwen"]["weights"])
