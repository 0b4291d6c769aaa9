"""Mixtral: experts in every layer, weights softmaxed over the winners (arXiv 2401.04088)."""

from moetron.moe.convert.families.config_keys import Same, Values
from moetron.moe.convert.families.decoder_blocks import (
    CONSTANTS,
    DECODER,
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

_GATED = ("w1", "w3", "w2")


def _rules(values: Values) -> list[Rule]:
    return decoder(
        values,
        lambda layer: attention(layer, values),
        lambda layer: experts(layer, values, "block_sparse_moe", _GATED),
    )


MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    experts=True,
    keys=(
        *DECODER,
        *HEADS,
        HEAD_DIM,
        Same("moe.num_experts", "num_local_experts"),
        Same("moe.moe_router_topk", "num_experts_per_tok"),
        Same("moe.moe_ffn_hidden_size", "intermediate_size"),
    ),
    fixed={**FIXED, **PLAIN_ROUTER, "moe.moe_router_pre_softmax": False},
    constants={**CONSTANTS, "sliding_window": None},
    rules=_rules,
)
