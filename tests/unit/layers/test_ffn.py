"""OpenMoE's and ST-MoE's feed-forward blocks against their formulas in plain torch."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from moetron.moe.config.bridge import transformer_config
from moetron.moe.config.schema.settings import Settings
from moetron.moe.layers.build_model import build_model
from tests.parallel.support.harness import model_parallel

HIDDEN, FFN, EXPERTS, HEADS = 16, 8, 4, 2


@pytest.fixture(autouse=True)
def _parallel_state() -> Iterator[None]:
    with model_parallel():
        yield


def _layer(model: dict[str, Any], moe: dict[str, Any]) -> Any:
    shape = {"num_layers": 2, "hidden_size": HIDDEN, "num_attention_heads": HEADS, "seq_length": 8}
    settings = Settings.model_validate(
        {
            "model": {**shape, "ffn_hidden_size": FFN, "init_method_std": 0.3, **model},
            "moe": {
                "num_experts": EXPERTS,
                "moe_layer_freq": [0, 1],
                "moe_router_pre_softmax": True,
                **moe,
            },
            "training": {"train_iters": 1, "micro_batch_size": 1, "global_batch_size": 1},
            "learning_rate": {"lr": 1e-3},
        }
    )
    return build_model(settings, transformer_config(settings), 64).eval().decoder.layers[1]


def _norm(x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (HIDDEN,), eps=1e-5)


def _double_gated(x: torch.Tensor, fc1: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    gate, up, linear = fc1.chunk(3)
    return (F.silu(x @ gate.T) * (x @ up.T) * (x @ linear.T)) @ down.T


def _dense(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    fc1 = torch.cat([mlp.linear_fc1.weight, mlp.linear_fc1_linear.weight])
    return _double_gated(x, fc1, mlp.linear_fc2.weight)


def _routed(layer: Any, x: torch.Tensor, expert: Any) -> torch.Tensor:
    """Return the sum over a token's two experts, weighted by raw softmax probabilities."""
    tokens = x.flatten(0, 1)
    weights, chosen = (tokens @ layer.mlp.router.weight.T).softmax(-1).topk(2)
    rows = [
        sum(w * expert(int(e), token) for w, e in zip(*pair, strict=True))
        for token, *pair in zip(tokens, weights, chosen, strict=True)
    ]
    return torch.stack(rows).view_as(x)


@torch.no_grad()
def test_openmoe_as_coded() -> None:
    """X += MoE(norm x), then x += FFN(norm' x), all double-gated."""
    layer = _layer({"ffn_type": "double_gated"}, {"moe_sequential_ffn_hidden_size": 2 * FFN})
    experts = layer.mlp.experts
    x = torch.randn(5, 2, HIDDEN)
    after = x + _routed(
        layer,
        _norm(x),
        lambda e, token: _double_gated(token, experts.weight1[e], experts.weight2[e]),
    )
    assert layer.extra_mlp.linear_fc2.weight.shape == (HIDDEN, 2 * FFN)
    expected = after + _dense(layer.extra_mlp, _norm(after))
    torch.testing.assert_close(layer._forward_mlp(x), expected)


@torch.no_grad()
def test_openmoe_as_written() -> None:
    """Equation 4: x + MoE(norm x) + FFN(norm x)."""
    layer = _layer({"ffn_type": "double_gated"}, {"moe_shared_expert_intermediate_size": 2 * FFN})
    experts = layer.mlp.experts
    x = torch.randn(5, 2, HIDDEN)
    routed = _routed(
        layer,
        _norm(x),
        lambda e, token: _double_gated(token, experts.weight1[e], experts.weight2[e]),
    )
    expected = x + routed + _dense(layer.mlp.shared_experts, _norm(x))
    torch.testing.assert_close(layer._forward_mlp(x), expected)


@torch.no_grad()
@pytest.mark.parametrize(("ffn_type", "activation"), [("geglu", F.gelu), ("relu", F.relu)])
def test_multiplicative_bias(ffn_type: str, activation: Any) -> None:
    layer = _layer({"ffn_type": ffn_type}, {"moe_expert_multiplicative_bias": True})
    experts = layer.mlp.experts
    assert torch.equal(experts.inner_scale, torch.ones(EXPERTS, FFN))
    experts.inner_scale.normal_()

    def expert(e: int, token: torch.Tensor) -> torch.Tensor:
        hidden = experts.weight1[e] @ token
        if ffn_type == "geglu":
            gate, up = hidden.chunk(2)
            inner = activation(gate) * up
        else:
            inner = activation(hidden)
        return experts.weight2[e] @ (inner * experts.inner_scale[e])

    x = torch.randn(5, 2, HIDDEN)
    torch.testing.assert_close(layer._forward_mlp(x), x + _routed(layer, _norm(x), expert))


def test_expert_dropout_only_in_training() -> None:
    layer = _layer({}, {"moe_expert_dropout": 0.5})
    x = torch.randn(64, 2, HIDDEN)
    first, second = layer._forward_mlp(x), layer._forward_mlp(x)
    assert torch.equal(first, second)
    layer.train()
    dropped = layer._forward_mlp(x)
    assert not torch.allclose(dropped, first)
    # Dropout keeps the mean: in a sum over many tokens its effect is small.
    spread = (dropped - first).abs().mean()
    assert (dropped - first).mean(dim=(0, 1)).abs().mean() < spread / 2


def test_variance_scaling() -> None:
    model = {
        "init_method": "variance_scaling",
        "init_method_scale": 0.1,
        "scaled_output_init": False,
        "hidden_size": 256,
        "ffn_hidden_size": 512,
        "query_init_folds_scale": True,
    }
    layer = _layer(model, {"moe_router_init_method_std": 0.02, "num_experts": 64})
    assert float(layer.mlp.experts.weight1.std()) == pytest.approx((0.1 / 256) ** 0.5, rel=0.02)
    assert float(layer.mlp.experts.weight2.std()) == pytest.approx((0.1 / 512) ** 0.5, rel=0.02)
    assert float(layer.mlp.router.weight.std()) == pytest.approx(0.02, rel=0.05)
    qkv = layer.self_attention.linear_qkv.weight.view(HEADS, 3, 128, 256)
    assert float(qkv[:, 0].std()) == pytest.approx((0.1 / 256 / 128) ** 0.5, rel=0.05)
    assert float(qkv[:, 1:].std()) == pytest.approx((0.1 / 256) ** 0.5, rel=0.05)


def test_variance_scaling_counts_the_inputs_of_all_tensor_ranks() -> None:
    settings = Settings.model_validate(
        {
            "model": {
                "num_layers": 1,
                "hidden_size": 256,
                "num_attention_heads": 4,
                "seq_length": 8,
                "init_method": "variance_scaling",
                "scaled_output_init": False,
                "embedding_init_method_std": 1.0,
            },
            "parallel": {"tensor_model_parallel_size": 4},
            "training": {"train_iters": 1, "micro_batch_size": 1, "global_batch_size": 1},
            "learning_rate": {"lr": 1e-3},
        }
    )
    config = transformer_config(settings)
    full, part = torch.empty(512, 256), torch.empty(512, 256 // 4)
    assert float(config.init_method(full).std()) == pytest.approx((0.1 / 256) ** 0.5, rel=0.05)
    drawn = config.output_layer_init_method(part)
    assert float(drawn.std()) == pytest.approx((0.1 / 256) ** 0.5, rel=0.05)
    assert float(config.embedding_init_method(full).std()) == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_norms_without_weights(kind: str) -> None:
    layer = _layer({"normalization": kind, "norm_affine": False}, {})
    assert not [name for name in layer.state_dict() if "norm" in name]
    assert not [name for name, _ in layer.named_parameters() if "norm" in name]
    x, ours = (torch.ones(3, 1, HIDDEN).cumsum(2).requires_grad_() for _ in "12")
    theirs = F.layer_norm if kind == "LayerNorm" else F.rms_norm
    expected, out = theirs(x, (HIDDEN,), eps=1e-5), layer.input_layernorm(ours)
    torch.testing.assert_close(out, expected)
    (out**3).sum().backward()
    (expected**3).sum().backward()
    torch.testing.assert_close(ours.grad, x.grad, rtol=1e-4, atol=1e-6)
