"""Dense decoders: Llama, OLMo, Qwen2 and Qwen3, also for upcycling."""

from moetron.moe.convert.families.config_keys import Same, Values
from moetron.moe.convert.families.decoder_blocks import (
    CONSTANTS,
    DECODER,
    DENSE_WIDTH,
    FIXED,
    HEAD_DIM,
    HEADS,
    UNNORMED,
    attention,
    decoder,
)
from moetron.moe.convert.families.family import Family
from moetron.moe.convert.families.rope import Rope, RopeScaling
from moetron.moe.convert.families.tensor_rules import Rule

_LLAMA3 = RopeScaling(
    {"attention.rotary_scaling_factor": "factor"},
    constants={
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
)
"""As in megatron-core's ``RotaryEmbedding``."""


def _rules(values: Values) -> list[Rule]:
    return decoder(values, lambda layer: attention(layer, values), lambda layer: [])


def _biased_rules(values: Values) -> list[Rule]:
    return decoder(values, lambda layer: attention(layer, values, bias=True), lambda layer: [])


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    experts=False,
    keys=(
        *DECODER,
        Same("model.num_query_groups", "num_key_value_heads", None),
        Rope({"llama3": _LLAMA3}),
        HEAD_DIM,
        DENSE_WIDTH,
    ),
    fixed=FIXED,
    constants={**CONSTANTS, "attention_bias": False, "mlp_bias": False},
    rules=_rules,
    whole_heads=True,
)
OLMO = Family(
    model_type="olmo",
    architecture="OlmoForCausalLM",
    experts=False,
    keys=(*UNNORMED, *HEADS, DENSE_WIDTH),
    fixed={
        **FIXED,
        "model.normalization": "LayerNorm",
        "model.norm_affine": False,
        "model.norm_epsilon": 1e-5,
    },
    constants={**CONSTANTS, "attention_bias": False, "clip_qkv": None},
    rules=_rules,
)
"""OLMo of arXiv 2402.00838: norms without weights."""
QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    experts=False,
    keys=(*DECODER, *HEADS, DENSE_WIDTH),
    fixed={**FIXED, "attention.add_qkv_bias": True},
    constants={**CONSTANTS, "use_sliding_window": False},
    rules=_biased_rules,
)
QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    experts=False,
    keys=(*DECODER, *HEADS, HEAD_DIM, DENSE_WIDTH),
    fixed={**FIXED, "model.qk_layernorm": True, "model.qk_layernorm_scope": "head"},
    constants={**CONSTANTS, "attention_bias": False, "use_sliding_window": False},
    rules=_rules,
)
