"""A small encoder-decoder, and HuggingFace's T5 and Switch of its size."""

from collections.abc import Mapping
from typing import Any

import torch
import transformers

from moetron.moe.config.bridge import transformer_config
from moetron.moe.config.schema.settings import Settings
from moetron.moe.convert.families.family import Family, function_of
from moetron.moe.encoder_decoder.build_stacks import build
from moetron.moe.layers.language_model import LanguageModel

ENCODER, DECODER, VOCABULARY, HEADS, WIDTH, EXPERTS = 24, 10, 48, 4, 8, 4
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
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": MODEL["hidden_size"],
    "d_kv": WIDTH,
    "d_ff": MODEL["ffn_hidden_size"],
    "num_layers": 2,
    "num_heads": HEADS,
    "relative_attention_max_distance": MODEL["relative_attention_max_distance"],
    "dropout_rate": 0.0,
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


def t5(tied: bool) -> transformers.T5ForConditionalGeneration:
    """Return a random dense T5 1.1 of 2 + 3 layers; tied: with a scaled output, as T5 1.0."""
    config = transformers.T5Config(
        **_SIZES,
        num_decoder_layers=3,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=tied,
    )
    config.tie_word_embeddings = tied  # transformers 5 ties all the same, or nothing
    model = _random(transformers.T5ForConditionalGeneration, config)
    for stack in (model.encoder, model.decoder):
        stack.set_input_embeddings(model.shared)
    return model


def switch(**changes: Any) -> transformers.SwitchTransformersForConditionalGeneration:
    """Return a random Switch of 2 + 4 layers, of which every second has `EXPERTS` experts."""
    config = transformers.SwitchTransformersConfig(
        **_SIZES,
        num_decoder_layers=4,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=2,
        num_experts=EXPERTS,
        router_jitter_noise=0.0,
        **changes,
    )
    return _random(transformers.SwitchTransformersForConditionalGeneration, config)


def _random(kind: Any, config: transformers.PretrainedConfig) -> Any:
    """Return a model whose norms and biases are not 1 and 0."""
    torch.manual_seed(3)
    model = kind(config).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def converted(
    family: Family, settings: Settings, theirs: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return their tensors, or gradients, under the names of our modules."""
    rules = family.rules(function_of(settings))
    joined = {rule.ours: rule.transform.join([theirs[n] for n in rule.theirs]) for rule in rules}
    return {_module_name(name): tensor for name, tensor in joined.items()}


def _module_name(name: str) -> str:
    """Return the name in a module of what a checkpoint has under ``name``."""
    for stored, held in (
        ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
        ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
        ("mlp.experts.experts.linear_fc1.weight", "mlp.experts.weight1"),
        ("mlp.experts.experts.linear_fc2.weight", "mlp.experts.weight2"),
    ):
        name = name.replace(stored, held)
    return name


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
