"""The model built from settings."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt import GPTModel, gpt_layer_specs
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_layer import TransformerLayer

from moetron.common.errors import RunError, UserError
from moetron.moe.config.bridge import transformer_config
from moetron.moe.config.schema.settings import Settings
from moetron.moe.layers import specs
from moetron.moe.layers.attention import SdpaAttention
from moetron.moe.layers.build_model import build_model, count_built
from moetron.moe.layers.experts import GroupedExperts
from moetron.moe.layers.norm import FullWidthRMSNorm, LayerNorm, RMSNorm
from moetron.moe.megatron.version_differences import submodules_of
from moetron.moe.routing.router import Router
from tests.parallel.support.harness import model_parallel

OLMOE = {
    "num_layers": 16,
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "seq_length": 4096,
    "qk_layernorm": True,
    "qk_layernorm_scope": "full",
    "init_method": "truncated_normal",
    "scaled_output_init": False,
}
OLMOE_EXPERTS = {
    "num_experts": 64,
    "moe_ffn_hidden_size": 1024,
    "moe_router_topk": 8,
    "moe_router_pre_softmax": True,
}
TINY = {"num_layers": 3, "hidden_size": 16, "num_attention_heads": 2, "seq_length": 8}


@pytest.fixture(autouse=True)
def _parallel_state() -> Iterator[None]:
    with model_parallel():
        yield


def _settings(model: dict[str, Any], moe: dict[str, Any], bf16: bool = False) -> Settings:
    return Settings.model_validate(
        {
            "model": model,
            "moe": moe,
            "precision": {"bf16": bf16},
            "training": {"train_iters": 1, "micro_batch_size": 1, "global_batch_size": 1},
            "learning_rate": {"lr": 1e-3},
        }
    )


def _build(
    model: dict[str, Any], moe: dict[str, Any], vocab_size: int, bf16: bool = False
) -> GPTModel:
    settings = _settings(model, moe, bf16)
    return build_model(settings, transformer_config(settings), vocab_size)


def test_olmoe_counts_its_parameters_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = _build(OLMOE, OLMOE_EXPERTS, vocab_size=50_280)
    parameters = dict(model.named_parameters())
    assert {p.device.type for p in parameters.values()} == {"meta"}
    assert not [name for name in parameters if "bias" in name]
    assert sum(p.numel() for p in parameters.values()) == 6_919_161_856
    matrices = ("word_embeddings.weight", "output_layer.weight")
    for part, expected in {
        ".experts.": 16 * 64 * 3 * 2048 * 1024,
        ".router.": 16 * 64 * 2048,
        "layernorm.weight": 16 * 4 * 2048 + 2048,
        "self_attention.linear": 16 * 4 * 2048 * 2048,
        matrices[0]: 50_304 * 2048,
        matrices[1]: 50_304 * 2048,
    }.items():
        assert sum(p.numel() for name, p in parameters.items() if part in name) == expected, part


def test_olmoe_modules() -> None:
    model = _build({**OLMOE, **TINY}, {"num_experts": 4, "moe_ffn_hidden_size": 8}, 100)
    layer = model.decoder.layers[0]
    assert isinstance(layer.input_layernorm, RMSNorm) and isinstance(layer.mlp.router, Router)
    assert isinstance(layer.self_attention.q_layernorm, FullWidthRMSNorm)
    assert isinstance(layer.self_attention.core_attention, SdpaAttention)
    assert isinstance(layer.mlp.experts, GroupedExperts)
    assert model.output_layer.weight is not model.embedding.word_embeddings.weight
    matrices = [p for p in model.parameters() if p.dim() > 1]
    assert len(matrices) == 2 + 3 * 5
    for weight in matrices:  # all drawn from the same truncated normal, none scaled
        assert float(weight.abs().max()) <= 0.06 and 0.015 < float(weight.std()) < 0.025


@pytest.mark.parametrize(
    ("frequency", "kinds"),
    [(1, [1, 1, 1]), (2, [1, 0, 1]), ([0, 1, 0], [0, 1, 0])],
)
def test_which_layers_have_experts(frequency: Any, kinds: list[int]) -> None:
    moe = {"num_experts": 4, "moe_ffn_hidden_size": 8, "moe_layer_freq": frequency}
    layers = _build(TINY, moe, 100).decoder.layers
    expected = [MoELayer if kind else MLP for kind in kinds]
    assert [type(layer.mlp) for layer in layers] == expected


@pytest.mark.parametrize("backend", ["auto", "sdpa"])
def test_attention_of_torch(backend: str) -> None:
    model = _build({**TINY, "attention_backend": backend}, {}, 100)
    assert isinstance(model.decoder.layers[0].self_attention.core_attention, SdpaAttention)


def test_alternatives(monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel in ("FLASH", "FUSED", "UNFUSED"):  # megatron-core records the last model's choice
        monkeypatch.delenv(f"NVTE_{kernel}_ATTN", raising=False)
    model = _build(
        {
            **TINY,
            "normalization": "LayerNorm",
            "qk_layernorm": True,
            "swiglu": False,
            "attention_backend": "unfused",
            "untie_embeddings_and_output_weights": False,
            "position_embedding_type": "none",
        },
        {"num_experts": 4, "moe_ffn_hidden_size": 8, "moe_grouped_gemm": False},
        100,
        bf16=True,
    )
    layer = model.decoder.layers[0]
    assert isinstance(layer.mlp.experts, SequentialMLP)
    assert isinstance(layer.self_attention.core_attention, DotProductAttention)
    assert isinstance(layer.self_attention.q_layernorm, LayerNorm)
    assert layer.self_attention.q_layernorm.weight.shape == (8,)
    assert isinstance(model.decoder.final_layernorm, LayerNorm)
    assert model.output_layer.weight is None and not hasattr(model, "rotary_pos_emb")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_widths_that_grouped_gemm_rejects_run_sequentially() -> None:
    experts = {"num_experts": 4, "moe_ffn_hidden_size": 6}
    layer = _build(TINY, experts, 100).decoder.layers[0]
    assert isinstance(layer.mlp.experts, SequentialMLP)


class _Kernels(LocalSpecProvider):
    """Stand-in for Transformer Engine's modules in megatron-core's spec of its layers."""

    linear = column_parallel_layer_norm_linear = LocalSpecProvider.column_parallel_linear

    def layer_norm(self, *_: bool, **__: bool) -> type:
        return RMSNorm

    def grouped_mlp_modules(self, *arguments: bool, **_: bool) -> Any:
        if len(arguments) == 2:  # megatron-core 0.16.1
            return TEGroupedMLP, None
        return partial(TEGroupedMLP, submodules=None)


def _built_by(spec: Any) -> type:
    """Return the class that a spec of either version of megatron-core builds."""
    built = spec.func if isinstance(spec, partial) else spec.module
    return getattr(built, "__self__", built)  # of the method of a class


@pytest.mark.parametrize(
    ("moe", "expected"),
    [
        ({}, GroupedExperts),
        ({"moe_ffn_hidden_size": 12}, TEGroupedMLP),
        ({"moe_experts_impl": "te"}, TEGroupedMLP),
        ({"moe_experts_impl": "grouped_mm"}, GroupedExperts),
    ],
)
def test_experts_in_layers_of_transformer_engine(
    monkeypatch: pytest.MonkeyPatch, moe: dict[str, Any], expected: type
) -> None:
    monkeypatch.setattr(gpt_layer_specs, "TESpecProvider", _Kernels, raising=False)
    monkeypatch.setattr(specs, "uses_transformer_engine", lambda _: True)
    settings = _settings(TINY, {"num_experts": 4, "moe_layer_freq": [0, 1, 0], **moe})
    layers = specs._layers(settings, transformer_config(settings))
    feed_forward = [layer.submodules.mlp for layer in layers]
    assert [_built_by(part) for part in feed_forward] == [MLP, MoELayer, MLP]
    assert _built_by(submodules_of(feed_forward[1]).experts) is expected


def test_missing_transformer_engine() -> None:
    with pytest.raises(UserError, match=r"it needs a GPU, and .*use --transformer-impl auto"):
        _build({**TINY, "transformer_impl": "transformer_engine"}, {}, 100)


OPENMOE = {"num_experts": 4, "moe_ffn_hidden_size": 8, "moe_sequential_ffn_hidden_size": 16}


@pytest.mark.parametrize(
    ("name", "value", "missing", "missing_of_experts"),
    [
        ("SequentialFfnLayer", "TransformerLayer", 3 * (4 * 16 * 16 + 16), 0),
        ("VariantExperts", "GroupedExperts", 0, 3 * 4 * 16 * 8),
    ],
)
def test_a_layer_spec_that_omits_a_block_is_an_error(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, missing: int, missing_of_experts: int
) -> None:
    """As megatron-core's specs of Transformer Engine did with OpenMoE's blocks."""

    class PlainLayer(TransformerLayer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            extra = ("extra_mlp", "extra_submodules", "ffn_hidden_size")
            super().__init__(*args, **{n: x for n, x in kwargs.items() if n not in extra})

    plain = {"TransformerLayer": PlainLayer, "GroupedExperts": GroupedExperts}
    double = {**TINY, "ffn_type": "double_gated"}
    built = count_built([_build(double, OPENMOE, 100)])
    monkeypatch.setattr(specs, name, plain[value])
    has = f"{built.dense - missing:,} parameters and {built.expert - missing_of_experts:,} of"
    with pytest.raises(RunError, match=f"stage 0 has {has} .* were {built.dense:,} and"):
        _build(double, OPENMOE, 100)


def test_attention_is_causal_and_loss_starts_near_uniform() -> None:
    model = _build({**OLMOE, **TINY}, {"num_experts": 4, "moe_ffn_hidden_size": 8}, 100).eval()
    tokens = torch.randint(100, (1, 8))
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 100
    positions = torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        logits, other = (model(t, positions, None) for t in (tokens, changed))
    assert logits.shape == (1, 8, 128)
    torch.testing.assert_close(logits[:, :5], other[:, :5])
    assert not torch.allclose(logits[:, 5:], other[:, 5:])
    assert float(logits.logsumexp(-1).mean()) == pytest.approx(4.85, abs=0.05)  # ln 128
