"""Dense decoders: Llama and Qwen3, also as the starts of upcycling."""

from moetron.moe.convert.blocks import (
    CONSTANTS,
    DECODER,
    DENSE_WIDTH,
    FIXED,
    HEAD_DIM,
    HEADS,
    attention,
    decoder,
)
from moetron.moe.convert.family import Family
from moetron.moe.convert.keys import Values
from moetron.moe.convert.rules import Rule

_KEYS = (*DECODER, *HEADS, HEAD_DIM, DENSE_WIDTH)


def _rules(values: Values) -> list[Rule]:
    return decoder(values, lambda layer: attention(layer, values), lambda layer: [])


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    experts=False,
    keys=_KEYS,
    fixed=FIXED,
    constants={**CONSTANTS, "attention_bias": False, "mlp_bias": False},
    rules=_rules,
)
QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    experts=False,
    keys=_KEYS,
    fixed={**FIXED, "model.qk_layernorm": True, "model.qk_layernorm_scope": "head"},
    constants={**CONSTANTS, "attention_bias": False, "use_sliding_window": False},
    rules=_rules,
)
