"""DeepSeek-V2 and V3: latent attention, shared experts, dense first layers.

arXiv 2405.04434 and 2412.19437.
"""

from moetron.common.errors import UserError
from moetron.moe.convert.families.config_keys import (
    FirstDense,
    Key,
    OneAsUnset,
    Same,
    SharedExperts,
    Values,
)
from moetron.moe.convert.families.decoder_blocks import (
    CONSTANTS,
    DECODER,
    DENSE_WIDTH,
    FIXED,
    decoder,
    experts,
    our_layer,
    shared_experts,
    their_layer,
)
from moetron.moe.convert.families.family import Family
from moetron.moe.convert.families.rope import YARN, Rope, RopeScaling
from moetron.moe.convert.families.tensor_rules import Rule

_YARN = RopeScaling(
    {
        "attention.rotary_scaling_factor": "factor",
        "attention.original_max_position_embeddings": "original_max_position_embeddings",
        "attention.beta_fast": "beta_fast",
        "attention.beta_slow": "beta_slow",
        "attention.mscale": "mscale",
        "attention.mscale_all_dim": "mscale_all_dim",
    },
    optional={"truncate": True},
)
_KEYS: tuple[Key, ...] = (
    *DECODER,
    Rope({YARN: _YARN}),
    Same("model.num_attention_heads", "num_key_value_heads"),
    Same("attention.q_lora_rank", "q_lora_rank"),
    Same("attention.kv_lora_rank", "kv_lora_rank"),
    Same("attention.qk_head_dim", "qk_nope_head_dim"),
    Same("attention.qk_pos_emb_head_dim", "qk_rope_head_dim"),
    Same("attention.v_head_dim", "v_head_dim"),
    DENSE_WIDTH,
    FirstDense(),
    SharedExperts(),
    Same("moe.num_experts", "n_routed_experts"),
    Same("moe.moe_router_topk", "num_experts_per_tok"),
    Same("moe.moe_ffn_hidden_size", "moe_intermediate_size"),
    OneAsUnset("moe.moe_router_topk_scaling_factor", "routed_scaling_factor", 1.0),
)
_FIXED = {**FIXED, "attention.multi_latent_attention": True, "model.qk_layernorm": True}
_CONSTANTS = {
    **CONSTANTS,
    "attention_bias": False,
    "rms_norm_eps": 1e-6,  # of the norms of compressed vectors
}


class _Groups:
    """Node-limited routing: transformers ranks groups by their best 2, megatron-core by k/g."""

    _keys = (
        OneAsUnset("moe.moe_router_num_groups", "n_group", 1),
        OneAsUnset("moe.moe_router_group_topk", "topk_group", 1),
    )

    def to_hf(self, values: Values) -> dict[str, object]:
        return {name: value for key in self._keys for name, value in key.to_hf(values).items()}

    def from_hf(self, config: Values) -> dict[str, object]:
        groups, kept = (config.get(name) or 1 for name in ("n_group", "topk_group"))
        if groups == 1:
            return {"moe.moe_router_num_groups": None, "moe.moe_router_group_topk": None}
        if config["num_experts_per_tok"] != 2 * kept:
            raise UserError(
                f"config.json: num_experts_per_tok {config['num_experts_per_tok']} is not twice "
                f"topk_group {kept}: transformers and megatron-core would rank groups differently"
            )
        return {"moe.moe_router_num_groups": groups, "moe.moe_router_group_topk": kept}


class _NoPrediction:
    """Multi-token prediction, which is not exported; transformers' default is one module."""

    def to_hf(self, values: Values) -> dict[str, object]:
        return {"num_nextn_predict_layers": 0}

    def from_hf(self, config: Values) -> dict[str, object]:
        return {}


def _attention(layer: int, values: Values) -> list[Rule]:
    ours, theirs = our_layer(layer), their_layer(layer)
    names = {
        "input_layernorm": "input_layernorm",
        "self_attention.linear_kv_down_proj": "self_attn.kv_a_proj_with_mqa",
        "self_attention.linear_kv_up_proj": "self_attn.kv_b_proj",
        "self_attention.linear_proj": "self_attn.o_proj",
    }
    norms = {"self_attention.linear_kv_up_proj": "self_attn.kv_a_layernorm"}
    if values["attention.q_lora_rank"] is None:
        names["self_attention.linear_q_proj"] = "self_attn.q_proj"
    else:
        names["self_attention.linear_q_down_proj"] = "self_attn.q_a_proj"
        names["self_attention.linear_q_up_proj"] = "self_attn.q_b_proj"
        norms["self_attention.linear_q_up_proj"] = "self_attn.q_a_layernorm"
    return [
        *(Rule(f"{ours}{a}.weight", (f"{theirs}{b}.weight",)) for a, b in names.items()),
        *(Rule(f"{ours}{a}.layer_norm_weight", (f"{theirs}{b}.weight",)) for a, b in norms.items()),
    ]


def _sparse(layer: int, values: Values) -> list[Rule]:
    rules = experts(layer, values)
    if values["moe.moe_shared_expert_intermediate_size"] is not None:
        rules += shared_experts(layer, "shared_experts")
    if values["moe.moe_router_enable_expert_bias"]:
        bias = f"{their_layer(layer)}mlp.gate.e_score_correction_bias"
        rules.append(Rule(f"{our_layer(layer)}mlp.router.expert_bias", (bias,), fp32=True))
    return rules


def _rules(values: Values) -> list[Rule]:
    return decoder(
        values, lambda layer: _attention(layer, values), lambda layer: _sparse(layer, values)
    )


DEEPSEEK_V2 = Family(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    experts=True,
    keys=_KEYS,
    fixed={
        **_FIXED,
        "moe.moe_router_score_function": "softmax",
        "moe.moe_router_pre_softmax": True,
    },
    constants={
        **_CONSTANTS,
        "mlp_bias": False,
        "topk_method": "greedy",
        "norm_topk_prob": False,
    },
    rules=_rules,
    whole_heads=True,
)
DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    experts=True,
    keys=(*_KEYS, _Groups(), _NoPrediction()),
    fixed={
        **_FIXED,
        "moe.moe_router_score_function": "sigmoid",
        "moe.moe_router_enable_expert_bias": True,
    },
    constants={**_CONSTANTS, "norm_topk_prob": True, "rope_interleave": True},
    rules=_rules,
)
