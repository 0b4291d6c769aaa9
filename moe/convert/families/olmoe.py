"""OLMoE: full-width QK-norm, experts in every layer, raw softmax weights (arXiv 2409.02060)."""

from moetron.moe.convert.families.config_keys import Not, Same, Values
from moetron.moe.convert.families.decoder_blocks import (
    CONSTANTS,
    DECODER,
    FIXED,
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


OLMOE = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    experts=True,
    keys=(
        *DECODER,
        *HEADS,
        Same("moe.num_experts", "num_experts"),
        Same("moe.moe_router_topk", "num_experts_per_tok"),
        Same("moe.moe_ffn_hidden_size", "intermediate_size"),
        Not("moe.moe_router_pre_softmax", "norm_topk_prob", False),
    ),
    fixed={**FIXED, **PLAIN_ROUTER, "model.qk_layernorm": True, "model.qk_layernorm_scope": "full"},
    constants={**CONSTANTS, "attention_bias": False, "clip_qkv": None},
    rules=_rules,
)
