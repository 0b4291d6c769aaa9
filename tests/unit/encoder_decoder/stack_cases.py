"""A small encoder-decoder and the weights of HuggingFace's T5 in its form."""

from typing import Any

import torch

from moetron.moe.config.bridge import transformer_config
from moetron.moe.config.schema.settings import Settings
from moetron.moe.encoder_decoder.build_stacks import build
from moetron.moe.layers.language_model import LanguageModel

ENCODER, DECODER, VOCABULARY, HEADS, WIDTH = 24, 10, 48, 4, 8
MODEL = {
    "num_layers": 5,
    "encoder_num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": HEADS,
    "kv_channels": WIDTH,
    "ffn_hidden_size": 40,
    "ffn_type": "geglu_tanh",
    "seq_length": ENCODER + DECODER,
    "position_embedding_type": "relative",
    "relative_attention_max_distance": 20,
    "norm_epsilon": 1e-6,
    "make_vocab_size_divisible_by": 1,
    "init_method_std": 0.2,
    "vocab_size": VOCABULARY,
}


def stack_settings(
    model: dict[str, Any] | None = None, moe: dict[str, Any] | None = None, **groups: dict[str, Any]
) -> Settings:
    return Settings.model_validate(
        {
            "model": {**MODEL, **(model or {})},
            "moe": moe or {},
            "precision": {"bf16": False},
            "training": {"train_iters": 1, "micro_batch_size": 2, "global_batch_size": 4},
            "learning_rate": {"lr": 1e-3},
            **groups,
            "attention": {"softmax_scale": 1.0},
            "data": {"mock_data": True, "encoder_seq_length": ENCODER, **groups.get("data", {})},
        }
    )


def stack_model(settings: Settings) -> LanguageModel:
    """Return the model with large relative biases, so that they matter."""
    built = build(settings, transformer_config(settings), VOCABULARY)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if "relative" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(5))
    return built


def stack_batch(seed: int = 0, samples: int = 2) -> dict[str, torch.Tensor]:
    """Return tokens and labels [b, S], and a loss mask of the decoder's positions."""
    generator = torch.Generator().manual_seed(seed)
    shape = (samples, ENCODER + DECODER)
    tokens, labels = (torch.randint(2, VOCABULARY, shape, generator=generator) for _ in range(2))
    mask = torch.zeros(shape)
    mask[:, ENCODER:] = 1.0
    return {"tokens": tokens, "labels": labels, "loss_mask": mask}


def fused(*matrices: torch.Tensor) -> torch.Tensor:
    """Interleave projections [A x width, H] head by head."""
    split = [matrix.view(HEADS, WIDTH, -1) for matrix in matrices]
    return torch.cat(split, dim=1).flatten(0, 1)


def from_t5(theirs: dict[str, torch.Tensor], encoder_layers: int, layers: int) -> dict[str, Any]:
    """Return our names and tensors for those of a dense T5 1.1."""
    ours = {
        "embedding.word_embeddings.weight": theirs["shared.weight"],
        "decoder.final_layernorm.weight": theirs["decoder.final_layer_norm.weight"],
        f"decoder.layers.{encoder_layers - 1}.final_layernorm.weight": theirs[
            "encoder.final_layer_norm.weight"
        ],
    }
    if "lm_head.weight" in theirs:
        ours["output_layer.weight"] = theirs["lm_head.weight"]
    for stack in ("encoder", "decoder"):
        table = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        ours[f"relative_biases.{stack}.relative_attention_bias.weight"] = theirs[table]
    for number in range(layers):
        stack = "encoder" if number < encoder_layers else "decoder"
        block = number if stack == "encoder" else number - encoder_layers
        ours |= {
            f"decoder.layers.{number}.{name}": tensor
            for name, tensor in _layer(theirs, f"{stack}.block.{block}.layer.", stack).items()
        }
    return ours


def _layer(theirs: dict[str, torch.Tensor], prefix: str, stack: str) -> dict[str, torch.Tensor]:
    def get(name: str) -> torch.Tensor:
        return theirs[f"{prefix}{name}.weight"]

    own = "0.SelfAttention"
    last = 1 if stack == "encoder" else 2
    ours = {
        "input_layernorm.weight": get("0.layer_norm"),
        "self_attention.linear_qkv.weight": fused(*(get(f"{own}.{x}") for x in "qkv")),
        "self_attention.linear_proj.weight": get(f"{own}.o"),
        "pre_mlp_layernorm.weight": get(f"{last}.layer_norm"),
        **_ffn(theirs, f"{prefix}{last}."),
    }
    if stack == "decoder":
        cross = "1.EncDecAttention"
        ours |= {
            "pre_cross_attn_layernorm.weight": get("1.layer_norm"),
            "cross_attention.linear_q.weight": get(f"{cross}.q"),
            "cross_attention.linear_kv.weight": fused(get(f"{cross}.k"), get(f"{cross}.v")),
            "cross_attention.linear_proj.weight": get(f"{cross}.o"),
        }
    return ours


def _ffn(theirs: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Return a gated FFN of T5 1.1, or a plain one or experts of Switch."""
    gated, plain, routed = (
        f"{prefix}{name}" for name in ("DenseReluDense.", "mlp.", "mlp.experts.")
    )
    if f"{gated}wi_0.weight" in theirs:
        both = [theirs[f"{gated}wi_{part}.weight"] for part in (0, 1)]
        last = theirs[f"{gated}wo.weight"]
        return {"mlp.linear_fc1.weight": torch.cat(both), "mlp.linear_fc2.weight": last}
    if f"{plain}wi.weight" in theirs:
        first, last = (theirs[f"{plain}{name}.weight"] for name in ("wi", "wo"))
        return {"mlp.linear_fc1.weight": first, "mlp.linear_fc2.weight": last}
    numbers = range(sum(name.startswith(routed) and ".wi." in name for name in theirs))
    first, last = (
        torch.stack([theirs[f"{routed}expert_{number}.{name}.weight"] for number in numbers])
        for name in ("wi", "wo")
    )
    router = theirs[f"{prefix}mlp.router.classifier.weight"]
    return {
        "mlp.router.weight": router,
        "mlp.experts.weight1": first,
        "mlp.experts.weight2": last,
    }


def assert_same_gradients(ours: torch.nn.Module, expected: dict[str, torch.Tensor]) -> None:
    """Assert equal gradients of all parameters, to 1e-5 of each one's largest entry."""
    names = dict(ours.named_parameters())
    assert expected.keys() == names.keys()
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        assert scale > 0, name
        torch.testing.assert_close(
            names[name].grad,
            gradient,
            rtol=0,
            atol=1e-5 * scale,
            msg=lambda text, name=name: f"{name}: {text}",
        )
