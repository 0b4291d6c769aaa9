"""Rules on FP8, each triggered alone, and FP8 settings in megatron-core's configuration."""

from typing import Any

import pytest

from moetron.moe.config import bridge
from moetron.moe.config.schema.derived import fp8_layers
from tests.unit.config.config_cases import found, make
from tests.unit.host.stand_ins import pretend_kernels

DELAYED = {"fp8_format": "hybrid"}
MXFP8 = {"fp8_format": "e4m3", "fp8_recipe": "mxfp8"}
GATHERED = {
    **DELAYED,
    "fp8_param_gather": True,
    "use_distributed_optimizer": True,
    "bf16": True,
    "device": "cuda",
    "te": True,
}
LATENT = {
    "multi_latent_attention": True,
    "kv_lora_rank": 16,
    "qk_head_dim": 16,
    "v_head_dim": 16,
}
PIPELINE = {"pipeline_model_parallel_size": 2, "world_size": 2}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"fp8_recipe": "mxfp8"}, "--fp8-recipe mxfp8 has no effect without --fp8-format"),
        ({"first_last_layers_bf16": True}, "--first-last-layers-bf16 has no effect without"),
        ({**MXFP8, "fp8_margin": 1}, "--fp8-margin 1 is for --fp8-recipe delayed"),
        ({**DELAYED, "first_last_layers_bf16": True}, "is incompatible with --fp8-recipe delayed"),
        (
            {
                **MXFP8,
                **PIPELINE,
                "first_last_layers_bf16": True,
                "num_layers_at_end_in_bf16": 3,
            },
            "--num-layers-at-end-in-bf16 3 exceeds the 2 layers of a pipeline stage",
        ),
        (
            {
                **DELAYED,
                **PIPELINE,
                "recompute_granularity": "selective",
                "recompute_modules": ["moe"],
            },
            "cannot recompute linear layers in a pipeline",
        ),
        ({"fp8_param_gather": True}, "--fp8-param-gather has no effect without --fp8-format"),
        ({**GATHERED, "device": "cpu"}, "--fp8-param-gather needs Transformer Engine's layers"),
        (
            {**GATHERED, "use_distributed_optimizer": False},
            "--fp8-param-gather needs --use-distributed-optimizer",
        ),
        ({**GATHERED, "bf16": False}, "--fp8-param-gather needs --bf16"),
        ({**GATHERED, "fp8_recipe": "mxfp8"}, "reuse of gradient buffers"),
        (
            {**GATHERED, **LATENT, "qk_pos_emb_head_dim": 8},
            "--kv-lora-rank + --qk-pos-emb-head-dim is 24 on a rank: FP8 matrix products need",
        ),
        ({**GATHERED, "moe_ffn_hidden_size": 24}, "--moe-ffn-hidden-size is 24 on a rank"),
    ],
)
def test_a_rule_is_reported_alone(changes: dict[str, Any], expected: str) -> None:
    problems = found(**changes)
    assert len(problems) == 1 and expected in problems[0], problems


@pytest.mark.parametrize(
    "changes",
    [
        {**DELAYED, "fp8_margin": 1, "fp8_amax_history_len": 16, "fp8_amax_compute_algo": "max"},
        {**MXFP8, "first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 0},
        {**DELAYED, **PIPELINE, "recompute_granularity": "selective"},
        {**DELAYED, "recompute_granularity": "selective", "recompute_modules": ["moe"]},
    ],
)
def test_compatible_settings(changes: dict[str, Any]) -> None:
    assert found(**changes) == []


def test_layers_in_fp8() -> None:
    assert fp8_layers(make()) == [False] * 4
    assert fp8_layers(make(**MXFP8)) == [True] * 4
    kept = make(**MXFP8, first_last_layers_bf16=True, num_layers_at_end_in_bf16=2)
    assert fp8_layers(kept) == [False, True, False, False]


def test_megatron_core_has_fp8_only_with_transformer_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = make(**DELAYED, fp8_margin=2, fp8_amax_history_len=16, fp8_amax_compute_algo="max")
    assert bridge.transformer_config(settings).fp8 is None
    # The configuration requires a version of Transformer Engine, which is not installed here.
    monkeypatch.setattr(
        "megatron.core.transformer.transformer_config.is_te_min_version", lambda *_: True
    )
    pretend_kernels(monkeypatch)
    config = bridge.transformer_config(settings, transformer_engine=True)
    assert (config.fp8, config.fp8_recipe, config.fp8_margin) == ("hybrid", "delayed", 2)
    assert (config.fp8_amax_history_len, config.fp8_amax_compute_algo) == (16, "max")
    kept = make(**MXFP8, first_last_layers_bf16=True, num_layers_at_start_in_bf16=2)
    config = bridge.transformer_config(kept, transformer_engine=True)
    assert (config.fp8, config.fp8_recipe) == ("e4m3", "mxfp8")
    assert config.first_last_layers_bf16
    assert (config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16) == (2, 1)
    assert bridge.transformer_config(make(), transformer_engine=True).fp8 is None


def test_parameters_in_fp8_reach_all_of_megatron_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "megatron.core.transformer.transformer_config.is_te_min_version", lambda *_: True
    )
    pretend_kernels(monkeypatch)
    assert not found(**GATHERED)
    values = {name: value for name, value in GATHERED.items() if name not in ("device", "te")}
    settings = make(**values)
    assert bridge.transformer_config(settings, transformer_engine=True).fp8_param
    assert bridge.ddp_config(settings).fp8_param_gather
    assert bridge.optimizer_config(settings).fp8_recipe == "delayed"
    without = make()
    assert not bridge.transformer_config(without, transformer_engine=True).fp8_param
    assert bridge.optimizer_config(without).fp8_recipe is None
