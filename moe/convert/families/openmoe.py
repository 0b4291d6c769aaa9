"""OpenMoE: double-gated FFNs, a few layers with experts, each with one more dense FFN.

arXiv 2402.01739 and its code. transformers has no such model: exported folders include our
modeling_openmoe.py, which documents each key.
"""

from moetron.moe.convert.families.config_keys import Not, Same, Values
from moetron.moe.convert.families.decoder_blocks import (
    DECODER,
    DENSE_WIDTH,
    FIXED,
    HEAD_DIM,
    HEADS,
    PLAIN_ROUTER,
    attention,
    decoder,
    dense_ffn,
    experts,
    gated,
    our_layer,
    their_layer,
)
from moetron.moe.convert.families.family import Family
from moetron.moe.convert.families.tensor_rules import Rule

_CODE = "modeling_openmoe"
_DOUBLE_GATED = ("gate_proj", "up_proj", "linear_proj", "down_proj")


def _linear(ours: str, theirs: str) -> Rule:
    return Rule(f"{ours}linear_fc1_linear.weight", (f"{theirs}linear_proj.weight",))


def _dense(layer: int) -> list[Rule]:
    return [*dense_ffn(layer), _linear(our_layer(layer) + "mlp.", their_layer(layer) + "mlp.")]


def _sparse(layer: int, values: Values) -> list[Rule]:
    ours, theirs = our_layer(layer), their_layer(layer)
    rules = experts(layer, values, names=_DOUBLE_GATED)
    dense = {
        "mlp.shared_experts.": ("mlp.shared_expert.", "moe_shared_expert_intermediate_size"),
        "extra_mlp.": ("extra_mlp.", "moe_sequential_ffn_hidden_size"),
    }
    for our_name, (their_name, width) in dense.items():
        if values[f"moe.{width}"] is not None:
            rules += gated(ours + our_name, theirs + their_name)
            rules.append(_linear(ours + our_name, theirs + their_name))
    if values["moe.moe_sequential_ffn_hidden_size"] is not None:
        name = "pre_extra_mlp_layernorm.weight"
        rules.append(Rule(ours + name, (theirs + name,)))
    return rules


def _rules(values: Values) -> list[Rule]:
    return decoder(
        values, lambda layer: attention(layer, values), lambda layer: _sparse(layer, values), _dense
    )


OPENMOE = Family(
    model_type="openmoe",
    architecture="OpenMoeForCausalLM",
    experts=True,
    keys=(
        *DECODER,
        *HEADS,
        HEAD_DIM,
        DENSE_WIDTH,
        Same("attention.softmax_scale", "attention_scale", None),
        Same("moe.moe_layer_freq", "moe_layers"),
        Same("moe.num_experts", "num_experts"),
        Same("moe.moe_router_topk", "num_experts_per_tok"),
        Not("moe.moe_router_pre_softmax", "norm_topk_prob", False),
        Same("moe.moe_ffn_hidden_size", "moe_intermediate_size"),
        Same("moe.moe_shared_expert_intermediate_size", "shared_expert_intermediate_size", None),
        Same("moe.moe_sequential_ffn_hidden_size", "extra_intermediate_size", None),
    ),
    fixed={**FIXED, **PLAIN_ROUTER, "model.ffn_type": "double_gated"},
    constants={
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "auto_map": {
            "AutoConfig": f"{_CODE}.OpenMoeConfig",
            "AutoModelForCausalLM": f"{_CODE}.OpenMoeForCausalLM",
        },
    },
    rules=_rules,
    code=f"{_CODE}.py",
)
