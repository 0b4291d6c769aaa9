"""Rules on shape, implementation and recomputation, each triggered alone."""

from typing import Any

import pytest

from tests.unit.config.config_cases import found

TP2 = {"world_size": 2, "tensor_model_parallel_size": 2}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"num_attention_heads": 6},
            "--hidden-size 64 is not a multiple of --num-attention-heads 6: use --hidden-size "
            "60 or 66, or --num-attention-heads 4 or 8",
        ),
        (
            {"num_query_groups": 3},
            "--num-attention-heads 8 is not a multiple of --num-query-groups 3",
        ),
        ({"kv_channels": 7}, "rotary embedding needs an even number of channels per head"),
        ({"rotary_percent": 0.1}, "rotary embedding needs an even number of channels per head"),
        (
            {"qk_layernorm_scope": "full"},
            "--qk-layernorm-scope full has no effect without --qk-layernorm",
        ),
        (
            {"transformer_impl": "transformer_engine", "device": "cuda"},
            "Transformer Engine is not installed",
        ),
        ({"transformer_impl": "transformer_engine", "te": True}, "needs a CUDA device"),
        (
            {"world_size": 2, "context_parallel_size": 2, "attention_backend": "unfused"},
            "--context-parallel-size 2 is incompatible with --attention-backend unfused",
        ),
        ({"add_bias_linear": True}, "--add-bias-linear: experts have no biases"),
        (
            {"qk_layernorm": True, "qk_layernorm_scope": "full", "norm_affine": False},
            "--no-norm-affine: the norm of --qk-layernorm-scope full has weights",
        ),
        (
            {"qk_layernorm": True, "qk_layernorm_scope": "full", "normalization": "LayerNorm"},
            "--qk-layernorm-scope full is an RMSNorm",
        ),
        (
            {"recompute_num_layers": 1},
            "--recompute-num-layers 1 has no effect without --recompute-granularity",
        ),
        (
            {"recompute_granularity": "full", "recompute_num_layers": 1},
            "needs --recompute-method uniform or block",
        ),
        (
            {"recompute_granularity": "full", "recompute_method": "uniform"},
            "needs --recompute-num-layers",
        ),
        (
            {
                "recompute_granularity": "full",
                "recompute_method": "uniform",
                "recompute_num_layers": 9,
            },
            "does not divide the layers of every (virtual) stage: use 4",
        ),
        (
            {"recompute_granularity": "selective", "recompute_method": "uniform"},
            "is for --recompute-granularity full",
        ),
        (
            {"recompute_granularity": "selective", "recompute_modules": ["attn"]},
            "--recompute-modules attn: must be among",
        ),
        (
            {
                "num_experts": None,
                "add_bias_linear": True,
                "recompute_granularity": "selective",
                "recompute_modules": ["mlp"],
            },
            "--recompute-modules mlp hangs with --add-bias-linear",
        ),
        (
            {
                "recompute_granularity": "selective",
                "recompute_modules": ["moe_act"],
            },
            "moe_act needs Transformer Engine's grouped experts",
        ),
    ],
)
def test_rule(changes: dict[str, Any], expected: str) -> None:
    (line,) = found(**changes)
    assert expected in line


@pytest.mark.parametrize(
    ("backend", "name", "value", "wanted"),
    [
        ("auto", "NVTE_FLASH_ATTN", "0", "1"),
        ("sdpa", "NVTE_UNFUSED_ATTN", "0", "1"),
        ("unfused", "NVTE_FUSED_ATTN", "1", "0"),
    ],
)
def test_variables_that_contradict_the_attention_backend(
    monkeypatch: pytest.MonkeyPatch, backend: str, name: str, value: str, wanted: str
) -> None:
    monkeypatch.setenv(name, wanted)
    assert not found(attention_backend=backend)
    monkeypatch.setenv(name, value)
    (line,) = found(attention_backend=backend)
    assert line.startswith(f"{name}={value} in the environment contradicts --attention-backend")
    assert line.endswith(f"unset {name}")
