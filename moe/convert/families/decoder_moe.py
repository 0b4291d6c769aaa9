"""Decoders with experts that differ in few keys: OLMoE, Mixtral, Qwen2-MoE and Qwen3-MoE."""

from moetron.moe.convert.families.config_keys import Not, Same, SparseStep, Values
from moetron.moe.convert.families.decoder_blocks import (
    CONSTANTS,
    DECODER,
    DENSE_WIDTH,
    FIXED,
    HEAD_DIM,
    HEADS,
    PLAIN_ROUTER,
    attention,
    decoder,
    experts,
    shared_experts,
)
from moetron.moe.convert.families.family import Family
from moetron.moe.convert.families.tensor_rules import Rule

_EXPERTS = Same("moe.num_experts", "num_experts")
_TOPK = Same("moe.moe_router_topk", "num_experts_per_tok")
_WIDTH = Same("moe.moe_ffn_hidden_size", "moe_intermediate_size")
_ONLY_WIDTH = Same("moe.moe_ffn_hidden_size", "intermediate_size")
_PRE_SOFTMAX = Not("moe.moe_router_pre_softmax", "norm_topk_prob", False)
_FIXED = {**FIXED, **PLAIN_ROUTER}


def _rules(values: Values) -> list[Rule]:
    return decoder(
        values, lambda layer: attention(layer, values), lambda layer: experts(layer, values)
    )


def _mixtral_rules(values: Values) -> list[Rule]:
    return decoder(
        values,
        lambda layer: attention(layer, values),
        lambda layer: experts(layer, values, "block_sparse_moe", ("w1", "w3", "w2")),
    )


def _qwen2_rules(values: Values) -> list[Rule]:
    return decoder(
        values,
        lambda layer: attention(layer, values, bias=True),
        lambda layer: [*experts(layer, values), *shared_experts(layer, "shared_expert", gate=True)],
    )


OLMOE = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    experts=True,
    keys=(*DECODER, *HEADS, _EXPERTS, _TOPK, _ONLY_WIDTH, _PRE_SOFTMAX),
    fixed={**_FIXED, "model.qk_layernorm": True, "model.qk_layernorm_scope": "full"},
    constants={**CONSTANTS, "attention_bias": False, "clip_qkv": None},
    rules=_rules,
)
"""Full-width QK-norm, experts in every layer, raw softmax weights (arXiv 2409.02060)."""
MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    experts=True,
    keys=(
        *DECODER,
        *HEADS,
        HEAD_DIM,
        Same("moe.num_experts", "num_local_experts"),
        _TOPK,
        _ONLY_WIDTH,
    ),
    fixed={**_FIXED, "moe.moe_router_pre_softmax": False},
    constants={**CONSTANTS, "sliding_window": None},
    rules=_mixtral_rules,
)
"""Experts in every layer, softmax over the selected logits (arXiv 2401.04088)."""
QWEN2_MOE = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    experts=True,
    keys=(
        *DECODER,
        *HEADS,
        DENSE_WIDTH,
        SparseStep(),
        _EXPERTS,
        _TOPK,
        _WIDTH,
        Same("moe.moe_shared_expert_intermediate_size", "shared_expert_intermediate_size"),
        _PRE_SOFTMAX,
    ),
    fixed={**_FIXED, "attention.add_qkv_bias": True, "moe.moe_shared_expert_gate": True},
    constants={**CONSTANTS, "qkv_bias": True, "use_sliding_window": False},
    rules=_qwen2_rules,
)
"""Gated shared experts, biases of queries, keys and values (arXiv 2407.10671, section 2.2)."""
QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    experts=True,
    keys=(
        *DECODER,
        *HEADS,
        HEAD_DIM,
        DENSE_WIDTH,
        SparseStep(),
        Same("moe.num_experts", "num_experts", alias="num_local_experts"),
        _TOPK,
        _WIDTH,
        _PRE_SOFTMAX,
    ),
    fixed={**_FIXED, "model.qk_layernorm": True, "model.qk_layernorm_scope": "head"},
    constants={**CONSTANTS, "attention_bias": False, "use_sliding_window": False},
    rules=_rules,
)
"""QK-norm by head, experts in all layers or some (arXiv 2505.09388)."""
