"""Qwen3-MoE: QK-norm by head, experts in all layers or some (arXiv 2505.09388)."""

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
)
from moetron.moe.convert.families.family import Family
from moetron.moe.convert.families.tensor_rules import Rule


def _rules(values: Values) -> list[Rule]:
    return decoder(
        values, lambda layer: attention(layer, values), lambda layer: experts(layer, values)
    )


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
        Same("moe.moe_router_topk", "num_experts_per_tok"),
        Same("moe.moe_ffn_hidden_size", "moe_intermediate_size"),
        Not("moe.moe_router_pre_softmax", "norm_topk_prob", False),
    ),
    fixed={**FIXED, **PLAIN_ROUTER, "model.qk_layernorm": True, "model.qk_layernorm_scope": "head"},
    constants={**CONSTANTS, "attention_bias": False, "use_sliding_window": False},
    rules=_rules,
)
