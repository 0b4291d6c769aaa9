"""Qwen2-MoE and Qwen1.5-MoE: gated shared experts, biases of queries, keys and values.

arXiv 2407.10671, section 2.2.
"""

from moetron.moe.convert.families.config_keys import Not, Same, SparseStep, Values
from moetron.moe.convert.families.decoder_blocks import (
    CONSTANTS,
    DECODER,
    DENSE_WIDTH,
    FIXED,
    HEADS,
    PLAIN_ROUTER,
    attention,
    decoder,
    experts,
    shared_experts,
)
from moetron.moe.convert.families.family import Family
from moetron.moe.convert.families.tensor_rules import Rule


def _rules(values: Values) -> list[Rule]:
    return decoder(
        values,
        lambda layer: attention(layer, values, bias=True),
        lambda layer: [*experts(layer, values), *shared_experts(layer, "shared_expert", gate=True)],
    )


QWEN2_MOE = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    experts=True,
    keys=(
        *DECODER,
        *HEADS,
        DENSE_WIDTH,
        SparseStep(),
        Same("moe.num_experts", "num_experts"),
        Same("moe.moe_router_topk", "num_experts_per_tok"),
        Same("moe.moe_ffn_hidden_size", "moe_intermediate_size"),
        Same("moe.moe_shared_expert_intermediate_size", "shared_expert_intermediate_size"),
        Not("moe.moe_router_pre_softmax", "norm_topk_prob", False),
    ),
    fixed={
        **FIXED,
        **PLAIN_ROUTER,
        "attention.add_qkv_bias": True,
        "moe.moe_shared_expert_gate": True,
    },
    constants={**CONSTANTS, "qkv_bias": True, "use_sliding_window": False},
    rules=_rules,
)
