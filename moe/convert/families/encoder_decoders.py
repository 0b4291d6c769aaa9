"""Encoder-decoders: T5, dense and 1.0 or 1.1, and Switch, whose experts take one token each."""

from dataclasses import dataclass
from typing import Any

from moetron.common.errors import UserError
from moetron.moe.convert.families.config_keys import (
    REQUIRED,
    DenseWidth,
    Key,
    Not,
    Same,
    Values,
    look_up,
)
from moetron.moe.convert.families.decoder_blocks import FIXED, PLAIN_ROUTER, our_layer
from moetron.moe.convert.families.family import Family
from moetron.moe.convert.families.tensor_rules import (
    FirstRows,
    GateUp,
    KeyValue,
    PerExpert,
    QueryKeyValue,
    Rule,
    Whole,
)

INPUTS, TARGETS = 512, 114
"""T5's sample. Relative biases have no longest sequence, so no key tells the lengths."""
UNLIMITED = 1 << 20
"""Capacity of an exported expert, in tokens of a sequence: more than any has."""
_LAYERS = "model.num_layers"
_ENCODER = "model.encoder_num_layers"
_PATTERN = "moe.moe_layer_freq"


@dataclass(frozen=True)
class Stacks:
    """Layers of both stacks, of which ours counts the sum, and the parts of a sample."""

    def to_hf(self, values: Values) -> dict[str, Any]:
        """Return the keys from settings."""
        encoder = values.get(_ENCODER) or 0
        return {"num_layers": encoder, "num_decoder_layers": values[_LAYERS] - encoder}

    def from_hf(self, config: Values) -> dict[str, Any]:
        """Return the settings from keys."""
        encoder, decoder = _depths(config)
        return {
            _LAYERS: encoder + decoder,
            _ENCODER: encoder,
            "model.seq_length": INPUTS + TARGETS,
            "data.encoder_seq_length": INPUTS,
        }


def _depths(config: Values) -> tuple[int, int]:
    """Return the layers of both stacks; those of the decoder are the encoder's if not given."""
    encoder = look_up(config, "num_layers", REQUIRED)
    decoder = config.get("num_decoder_layers")
    return encoder, encoder if decoder is None else decoder


@dataclass(frozen=True)
class FeedForward:
    """``feed_forward_proj`` of T5 1.0 (ReLU) and 1.1 (GELU by tanh, gated)."""

    names = {"relu": "relu", "geglu_tanh": "gated-gelu"}

    def to_hf(self, values: Values) -> dict[str, Any]:
        """Return the key from the setting."""
        return {"feed_forward_proj": self.names.get(values["model.ffn_type"], "relu")}

    def from_hf(self, config: Values) -> dict[str, Any]:
        """Return the setting from the key."""
        name = config.get("feed_forward_proj", "relu")
        found = [ours for ours, theirs in self.names.items() if theirs == name]
        if not found:
            raise UserError(
                f"config.json: `feed_forward_proj` is {name!r}, and only "
                f"{' and '.join(self.names.values())} are supported"
            )
        return {"model.ffn_type": found[0]}


@dataclass(frozen=True)
class ScaledOutput:
    """T5 scales the decoder's output where the output layer is the embedding, and only there."""

    tied = Not("model.untie_embeddings_and_output_weights", "tie_word_embeddings", True)

    def to_hf(self, values: Values) -> dict[str, Any]:
        """Return the key from the setting."""
        return self.tied.to_hf(values)

    def from_hf(self, config: Values) -> dict[str, Any]:
        """Return the setting from the key."""
        tied = config.get("tie_word_embeddings", True)
        if config.get("scale_decoder_outputs", tied) != tied:
            raise UserError(
                f"config.json: `scale_decoder_outputs` with `tie_word_embeddings` {tied!r}: a tied "
                "output is scaled here, another is not"
            )
        return self.tied.from_hf(config)


@dataclass(frozen=True)
class SparseLayers:
    """Switch's experts: layers i of a stack with i % step == 1, step its layers / sparse layers."""

    def to_hf(self, values: Values) -> dict[str, Any]:
        """Return the numbers of sparse layers, from the list of all layers."""
        pattern, encoder = values.get(_PATTERN, []), values.get(_ENCODER) or 0
        return {
            "num_sparse_encoder_layers": sum(pattern[:encoder]),
            "num_sparse_decoder_layers": sum(pattern[encoder:]),
        }

    def from_hf(self, config: Values) -> dict[str, Any]:
        """Return the list of all layers."""
        counts = (config.get(f"num_sparse_{stack}_layers", 3) for stack in ("encoder", "decoder"))
        pattern: list[int] = []
        for layers, count in zip(_depths(config), counts, strict=True):
            step = layers // count if count else layers
            pattern += [int(step == 1 or (step > 0 and i % step == 1)) for i in range(layers)]
        return {_PATTERN: pattern}


@dataclass(frozen=True)
class Unlimited:
    """``expert_capacity`` of an exported model, which drops no token; not read."""

    def to_hf(self, values: Values) -> dict[str, Any]:
        """Return the key."""
        return {"expert_capacity": UNLIMITED}

    def from_hf(self, config: Values) -> dict[str, Any]:
        """Return nothing."""
        return {}


def _ends(values: Values) -> list[Rule]:
    """Return rules of embedding, final norms, tables of biases and, unless tied, output matrix."""
    rows, encoder = FirstRows(values["model.vocab_size"]), values[_ENCODER]
    rules = [
        Rule("embedding.word_embeddings.weight", ("shared.weight",), rows),
        Rule(
            f"{our_layer(encoder - 1)}final_layernorm.weight", ("encoder.final_layer_norm.weight",)
        ),
        Rule("decoder.final_layernorm.weight", ("decoder.final_layer_norm.weight",)),
    ]
    for stack in ("encoder", "decoder"):
        table = "relative_attention_bias.weight"
        theirs = f"{stack}.block.0.layer.0.SelfAttention.{table}"
        rules.append(Rule(f"relative_biases.{stack}.{table}", (theirs,)))
    if values["model.untie_embeddings_and_output_weights"]:
        rules.append(Rule("output_layer.weight", ("lm_head.weight",), rows))
    return rules


def _attention(ours: str, theirs: str, is_decoder: bool, values: Values) -> list[Rule]:
    """Return rules of norms and projections of a layer, those of cross-attention included."""
    heads, width = values["model.num_attention_heads"], values["model.kv_channels"]

    def fused(letters: str, module: str) -> tuple[str, ...]:
        return tuple(f"{theirs}{module}.{letter}.weight" for letter in letters)

    own, crossing = "0.SelfAttention", "1.EncDecAttention"
    rules = [
        Rule(
            f"{ours}self_attention.linear_qkv.layer_norm_weight", (f"{theirs}0.layer_norm.weight",)
        ),
        Rule(
            f"{ours}self_attention.linear_qkv.weight",
            fused("qkv", own),
            QueryKeyValue(heads, heads, width),
        ),
        Rule(f"{ours}self_attention.linear_proj.weight", fused("o", own)),
    ]
    if not is_decoder:
        return rules
    both = KeyValue(heads, width)
    return [
        *rules,
        Rule(f"{ours}pre_cross_attn_layernorm.weight", (f"{theirs}1.layer_norm.weight",)),
        Rule(f"{ours}cross_attention.linear_q.weight", fused("q", crossing)),
        Rule(f"{ours}cross_attention.linear_kv.weight", fused("kv", crossing), both),
        Rule(f"{ours}cross_attention.linear_proj.weight", fused("o", crossing)),
    ]


def _dense(ours: str, theirs: str, module: str, gated: bool) -> list[Rule]:
    """Return rules of norm and FFN; ``theirs`` is the prefix of the sub-layer."""
    names = ("wi_0", "wi_1") if gated else ("wi",)
    first = tuple(f"{theirs}{module}.{name}.weight" for name in names)
    return [
        Rule(f"{ours}mlp.linear_fc1.layer_norm_weight", (f"{theirs}layer_norm.weight",)),
        Rule(f"{ours}mlp.linear_fc1.weight", first, GateUp(len(first))),
        Rule(f"{ours}mlp.linear_fc2.weight", (f"{theirs}{module}.wo.weight",)),
    ]


def _experts(ours: str, theirs: str, values: Values) -> list[Rule]:
    """Return rules of norm, router and experts of two matrices."""
    count = values["moe.num_experts"]
    rules = [
        Rule(f"{ours}pre_mlp_layernorm.weight", (f"{theirs}layer_norm.weight",)),
        Rule(f"{ours}mlp.router.weight", (f"{theirs}mlp.router.classifier.weight",)),
    ]
    for number, name in enumerate(("wi", "wo"), 1):
        each = tuple(f"{theirs}mlp.experts.expert_{e}.{name}.weight" for e in range(count))
        stack = f"{ours}mlp.experts.experts.linear_fc{number}.weight"
        rules.append(Rule(stack, each, PerExpert(count, Whole())))
    return rules


def _rules(values: Values, module: str) -> list[Rule]:
    """Return all rules; ``module``: name of a dense FFN."""
    rules, encoder, layers = _ends(values), values[_ENCODER], values[_LAYERS]
    pattern = values.get(_PATTERN) or [0] * layers
    gated = values["model.ffn_type"] == "geglu_tanh"
    for layer in range(layers):
        is_decoder = layer >= encoder
        block = f"decoder.block.{layer - encoder}" if is_decoder else f"encoder.block.{layer}"
        ours, theirs = our_layer(layer), f"{block}.layer."
        ffn = f"{theirs}{2 if is_decoder else 1}."
        rules += _attention(ours, theirs, is_decoder, values)
        sparse = pattern[layer]
        rules += _experts(ours, ffn, values) if sparse else _dense(ours, ffn, module, gated)
    return rules


_KEYS: tuple[Key, ...] = (
    Stacks(),
    Same("model.hidden_size", "d_model"),
    Same("model.num_attention_heads", "num_heads"),
    Same("model.kv_channels", "d_kv"),
    DenseWidth("d_ff"),
    Same("model.vocab_size", "vocab_size"),
    Same("model.relative_attention_num_buckets", "relative_attention_num_buckets", 32),
    Same("model.relative_attention_max_distance", "relative_attention_max_distance", 128),
    Same("model.norm_epsilon", "layer_norm_epsilon", 1e-6),
    Same("model.init_method_std", "initializer_range", 0.02),
    ScaledOutput(),
)
_FIXED: dict[str, Any] = {
    **FIXED,
    "model.position_embedding_type": "relative",
    "attention.softmax_scale": 1.0,
}
_COPIES = (
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
    "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
)
T5 = Family(
    model_type="t5",
    architecture="T5ForConditionalGeneration",
    experts=False,
    keys=(*_KEYS, FeedForward()),
    fixed=_FIXED,
    constants={"is_encoder_decoder": True},
    rules=lambda values: _rules(values, "DenseReluDense"),
    unused=_COPIES,
    has_encoder=True,
)
SWITCH = Family(
    model_type="switch_transformers",
    architecture="SwitchTransformersForConditionalGeneration",
    experts=True,
    keys=(*_KEYS, SparseLayers(), Same("moe.num_experts", "num_experts", 8), Unlimited()),
    fixed={
        **_FIXED,
        **PLAIN_ROUTER,
        "model.ffn_type": "relu",
        "moe.moe_router_topk": 1,
        "moe.moe_router_pre_softmax": True,
    },
    constants={"is_encoder_decoder": True, "dense_act_fn": "relu", "router_bias": False},
    rules=lambda values: _rules(values, "mlp"),
    unused=_COPIES,
    has_encoder=True,
)
"""One expert a token, weighted by its probability (arXiv 2101.03961)."""
