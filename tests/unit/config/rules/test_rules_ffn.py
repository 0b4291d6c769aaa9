"""Rules on feed-forward blocks and initialisation, each triggered alone."""

from typing import Any

import pytest

from moetron.moe.config.schema.implementation import beyond_transformer_engine, is_local
from tests.unit.config.config_cases import found, make

TP2 = {"world_size": 2, "tensor_model_parallel_size": 2}
FP8 = {"fp8_format": "hybrid", "fp8_recipe": "tensorwise"}
BEYOND: dict[str, dict[str, Any]] = {
    "ffn_type": {"ffn_type": "double_gated"},
    "norm_affine": {"norm_affine": False},
    "moe_expert_multiplicative_bias": {"moe_expert_multiplicative_bias": True},
    "moe_expert_dropout": {"moe_expert_dropout": 0.1},
    "moe_sequential_ffn_hidden_size": {"moe_sequential_ffn_hidden_size": 64},
}
GROUPED = ("ffn_type", "moe_expert_multiplicative_bias", "moe_expert_dropout")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"ffn_type": "geglu", "swiglu": False},
            "--no-swiglu has no effect with --ffn-type geglu",
        ),
        (
            {"num_experts": None, "ffn_type": "double_gated", "add_bias_linear": True},
            "--ffn-type double_gated has no biases",
        ),
        (
            {"num_experts": None, "moe_expert_dropout": 0.1},
            "--moe-expert-dropout 0.1 needs --num-experts",
        ),
        (
            {"num_experts": None, "moe_sequential_ffn_hidden_size": 64},
            "--moe-sequential-ffn-hidden-size 64 needs --num-experts",
        ),
        *(
            ({**BEYOND[name], **FP8}, "is incompatible with --fp8-format hybrid: drop one")
            for name in GROUPED
        ),
        *(
            ({**BEYOND[name], "moe_grouped_gemm": False}, "needs --moe-grouped-gemm")
            for name in GROUPED
        ),
        (
            {"ffn_type": "double_gated", "moe_ffn_hidden_size": 36},
            "--hidden-size and --moe-ffn-hidden-size of a rank, 64 and 36, must be multiples of 8",
        ),
        (
            {**TP2, "init_method": "variance_scaling", "expert_tensor_parallel_size": 1},
            "--init-method variance_scaling needs --expert-tensor-parallel-size 2",
        ),
        (
            {"query_init_folds_scale": True, "multi_latent_attention": True},
            "--query-init-folds-scale is incompatible with --multi-latent-attention",
        ),
        (
            {"num_experts": None, "moe_router_init_method_std": 0.1},
            "--moe-router-init-method-std 0.1 needs --num-experts",
        ),
    ],
)
def test_rule(changes: dict[str, Any], expected: str) -> None:
    (line,) = found(**changes)
    assert expected in line


@pytest.mark.parametrize("name", BEYOND)
def test_models_that_transformer_engine_does_not_support(name: str) -> None:
    """``auto`` selects local layers; ``transformer_engine`` is refused."""
    chosen = make(**BEYOND[name])
    assert beyond_transformer_engine(chosen) == [name]
    assert is_local(chosen, te=True)
    on_gpu = {"device": "cuda", "te": True}
    assert not found(**on_gpu, **BEYOND[name])
    (line,) = found(**on_gpu, **BEYOND[name], transformer_impl="transformer_engine")
    assert "needs --transformer-impl local (or auto, which selects it)" in line


def test_a_plain_model_uses_transformer_engine_if_usable() -> None:
    assert not beyond_transformer_engine(make())
    assert not is_local(make(), te=True) and is_local(make(), te=False)
    assert is_local(make(transformer_impl="local"), te=True)
