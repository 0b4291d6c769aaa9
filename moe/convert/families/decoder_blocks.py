"""Keys and tensor rules common to most HuggingFace decoders."""

from collections.abc import Callable, Sequence
from typing import Any

from moetron.moe.convert.families.config_keys import DenseWidth, Key, Not, Same, Values
from moetron.moe.convert.families.rope import Rope
from moetron.moe.convert.families.tensor_rules import (
    FirstRows,
    GateUp,
    PerExpert,
    QueryKeyValue,
    Rule,
    Whole,
)

UNNORMED: tuple[Key, ...] = (
    Same("model.num_layers", "num_hidden_layers"),
    Same("model.hidden_size", "hidden_size"),
    Same("model.num_attention_heads", "num_attention_heads"),
    Same("model.vocab_size", "vocab_size"),
    Same("model.seq_length", "max_position_embeddings"),
    Same("model.init_method_std", "initializer_range", 0.02),
    Not("model.untie_embeddings_and_output_weights", "tie_word_embeddings", False),
)
"""Keys of every family."""
DECODER = (*UNNORMED, Same("model.norm_epsilon", "rms_norm_eps"))
"""Keys of every family with weighted RMSNorms."""
HEADS: tuple[Key, ...] = (Same("model.num_query_groups", "num_key_value_heads", None), Rope({}))
"""Keys of attention with plain heads."""
HEAD_DIM = Same("model.kv_channels", "head_dim", None)
DENSE_WIDTH = DenseWidth()
FIXED: dict[str, Any] = {"model.make_vocab_size_divisible_by": 1, "model.add_bias_linear": False}
"""Settings of every family; an imported vocabulary is not padded."""
PLAIN_ROUTER: dict[str, Any] = {"moe.moe_router_score_function": "softmax"}
CONSTANTS: dict[str, Any] = {"hidden_act": "silu"}

_NORM_WEIGHTS = ("layernorm.weight", "layer_norm_weight")
GATED = ("gate_proj", "up_proj", "down_proj")


def their_layer(layer: int) -> str:
    """Return the prefix of a layer's tensors in HuggingFace files."""
    return f"model.layers.{layer}."


def our_layer(layer: int) -> str:
    """Return the prefix of a layer's tensors in our checkpoints."""
    return f"decoder.layers.{layer}."


def ends(values: Values) -> list[Rule]:
    """Return rules of embedding, final norm and, unless tied, output matrix."""
    rows = FirstRows(values["model.vocab_size"])
    rules = [
        Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), rows),
        Rule("decoder.final_layernorm.weight", ("model.norm.weight",)),
    ]
    if values["model.untie_embeddings_and_output_weights"]:
        rules.append(Rule("output_layer.weight", ("lm_head.weight",), rows))
    return rules


def attention(layer: int, values: Values, bias: bool = False) -> list[Rule]:
    """Return rules of norm, projections and optional QK-norm; ``bias``: of q, k and v."""
    ours, theirs = our_layer(layer) + "self_attention.", their_layer(layer) + "self_attn."
    fused = QueryKeyValue(
        values["model.num_attention_heads"],
        values["model.num_query_groups"],
        values["model.kv_channels"],
    )
    norm = their_layer(layer) + "input_layernorm.weight"
    rules = [Rule(f"{ours}linear_qkv.layer_norm_weight", (norm,))]
    for part in ("weight", "bias") if bias else ("weight",):
        names = tuple(f"{theirs}{letter}_proj.{part}" for letter in "qkv")
        rules.append(Rule(f"{ours}linear_qkv.{part}", names, fused))
    rules.append(Rule(f"{ours}linear_proj.weight", (f"{theirs}o_proj.weight",)))
    if values["model.qk_layernorm"]:
        rules += [
            Rule(f"{ours}{letter}_layernorm.weight", (f"{theirs}{letter}_norm.weight",))
            for letter in "qk"
        ]
    return rules


def dense_ffn(layer: int) -> list[Rule]:
    """Return rules of norm and gated FFN of a layer without experts."""
    ours, theirs = our_layer(layer) + "mlp.", their_layer(layer)
    norm = theirs + "post_attention_layernorm.weight"
    return [Rule(f"{ours}linear_fc1.layer_norm_weight", (norm,)), *gated(ours, theirs + "mlp.")]


def gated(ours: str, theirs: str) -> list[Rule]:
    """Return rules of the matrices of one gated FFN, given name prefixes."""
    gate, up, down = (f"{theirs}{name}.weight" for name in GATED)
    return [
        Rule(f"{ours}linear_fc1.weight", (gate, up), GateUp()),
        Rule(f"{ours}linear_fc2.weight", (down,)),
    ]


def shared_experts(layer: int, module: str, gate: bool = False) -> list[Rule]:
    """Return rules of shared experts, HuggingFace's ``mlp.module``; ``gate``: with output gate."""
    ours, theirs = f"{our_layer(layer)}mlp.shared_experts.", f"{their_layer(layer)}mlp.{module}"
    gates = [Rule(f"{ours}gate_weight", (f"{theirs}_gate.weight",))] if gate else []
    return [*gated(ours, theirs + "."), *gates]


def experts(
    layer: int, values: Values, module: str = "mlp", names: Sequence[str] = GATED
) -> list[Rule]:
    """Return rules of norm, router and experts, ``MODULE.gate`` and ``MODULE.experts.N.NAME``."""
    ours, theirs = our_layer(layer), their_layer(layer) + module
    count = values["moe.num_experts"]
    *inner, down = (f"{name}.weight" for name in names)

    def of_all(*parts: str) -> tuple[str, ...]:
        return tuple(f"{theirs}.experts.{e}.{part}" for e in range(count) for part in parts)

    stack = f"{ours}mlp.experts.experts.linear_fc"
    return [
        Rule(f"{ours}pre_mlp_layernorm.weight", (_mlp_norm(layer),)),
        Rule(f"{ours}mlp.router.weight", (f"{theirs}.gate.weight",)),
        Rule(f"{stack}1.weight", of_all(*inner), PerExpert(count, GateUp(len(inner)))),
        Rule(f"{stack}2.weight", of_all(down), PerExpert(count, Whole())),
    ]


def decoder(
    values: Values,
    attention: Callable[[int], list[Rule]],
    sparse: Callable[[int], list[Rule]],
    dense: Callable[[int], list[Rule]] = dense_ffn,
) -> list[Rule]:
    """Return all rules of a decoder, from rules of one layer's attention, experts, dense FFN."""
    rules = ends(values)
    pattern = values.get("moe.moe_layer_freq") or [0] * values["model.num_layers"]
    for layer, has_experts in enumerate(pattern):
        rules += [*attention(layer), *(sparse(layer) if has_experts else dense(layer))]
    if not values["model.norm_affine"]:
        rules = [rule for rule in rules if not rule.ours.endswith(_NORM_WEIGHTS)]
    return rules


def _mlp_norm(layer: int) -> str:
    return their_layer(layer) + "post_attention_layernorm.weight"
