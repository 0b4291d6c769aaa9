"""Parameters of all recipes, against published counts and HuggingFace's models."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moetron.commands import plan
from moetron.moe.plan.parameters import ParameterCount, count_parameters

TOOL = Path(__file__).resolve().parents[3] / "tools" / "plan.py"


PUBLISHED: dict[str, tuple[float, float | None, float]] = {
    # total and active without token prediction, and the precision of the published values
    "olmoe_1b_7b": (6_919_161_856, 1_282_017_280, 0),  # facts: the released model's own
    "olmoe_dense_1b": (1_279_920_128, 1_279_920_128, 0),  # the released block, FFN 8192
    "olmo_1b": (1_176_764_416, 1_176_764_416, 0),
    "openmoe_base": (0.800e9, None, 1e-3),  # as coded; the paper counts three matrices an FFN
    "openmoe_8b": (11.855e9, None, 1e-3),
    "openmoe_34b": (46.271e9, None, 1e-3),
    "mixtral_8x7b": (46.7e9, 12.9e9, 2e-3),
    "deepseek_moe_16b": (16.4e9, 2.8e9, 0.011),  # no HuggingFace class; the card rounds
    "qwen1_5_moe": (14.3e9, 2.7e9, 5e-3),
    "qwen2_57b_a14b": (57.4e9, 14.2e9, 5e-3),
    "qwen3_30b_a3b": (30.5e9, 3.35e9, 2e-3),  # the card truncates to 3.3
    "deepseek_v2_lite": (15.7e9, None, 1e-3),  # 2.4 B active leaves vocabulary matrices out
    "deepseek_v3": (671e9, 37.6e9, 2e-3),  # the paper truncates to 37
    "st_moe_base": (700_641_024, None, 0),  # tests/unit/encoder_decoder/test_stack_counts.py
    # Decoders of encoder-decoders, by hand below.
    "gshard": (39_392_266_240, None, 0),
    "st_moe_l": (2_035_817_472, None, 0),
    "st_moe_32b": (132_711_336_960, None, 0),
    "switch_base": (3_730_459_392, None, 0),
}

DEEPSEEK: dict[str, Any] = {
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}
HUGGINGFACE: dict[str, dict[str, Any]] = {
    "mixtral_8x7b": {"model_type": "mixtral", "vocab_size": 32000},
    "qwen1_5_moe": {
        "model_type": "qwen2_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts": 60,
    },
    "qwen2_57b_a14b": {
        "model_type": "qwen2_moe",
        "vocab_size": 151936,
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 2560,
        "shared_expert_intermediate_size": 20480,
        "num_experts": 64,
    },
    "qwen3_30b_a3b": {
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "moe_intermediate_size": 768,
        "num_experts": 128,
    },
    "deepseek_v2_lite": {
        **DEEPSEEK,
        "model_type": "deepseek_v2",
        "vocab_size": 102400,
        "hidden_size": 2048,
        "num_hidden_layers": 27,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "q_lora_rank": None,
    },
    "deepseek_v3": {"model_type": "deepseek_v3"},  # the class's defaults are the released model's
    "olmo_1b": {
        "model_type": "olmo",
        "vocab_size": 50304,
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "intermediate_size": 8192,
        "tie_word_embeddings": True,
        "pad_token_id": 1,
    },
}


def _count(name: str) -> ParameterCount:
    settings = plan.planned(plan.find(name), None, 0, []).settings
    return count_parameters(settings, settings.model.vocab_size)


def test_every_recipe_has_a_published_count() -> None:
    assert set(plan.recipe_names()) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published(name: str) -> None:
    total, active, tolerance = PUBLISHED[name]
    count = _count(name)
    assert count.main == pytest.approx(total, rel=tolerance)
    if active is not None:
        assert count.active == pytest.approx(active, rel=tolerance)


@pytest.mark.parametrize("name", HUGGINGFACE)
def test_huggingface(name: str) -> None:
    values = dict(HUGGINGFACE[name])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(values.pop("model_type"), **values)
        )
    theirs = sum(parameter.numel() for parameter in model.parameters())
    assert _count(name).main == theirs


def test_every_recipe_has_a_page_that_the_table_names() -> None:
    page = (plan.recipes_folder() / "README.md").read_text(encoding="utf-8")
    for name in plan.recipe_names():
        assert f"[{name}]({name}/README.md)" in page
        assert (
            (plan.recipes_folder() / name / "README.md")
            .read_text(encoding="utf-8")
            .startswith("# ")
        )


def test_decoders_by_hand() -> None:
    """Count L x 4 H A + FFNs + routers + embeddings + norms of the decoder-only adaptations."""
    switch = 12 * 4 * 768 * 768 + 6 * 3 * 768 * 2048 * (1 + 128) + 6 * 768 * 128
    assert _count("switch_base").main == switch + 2 * 32128 * 768 + 25 * 768
    gshard = 36 * 4 * 1024 * 2048 + 18 * 2 * 1024 * 8192 * (1 + 128) + 18 * 1024 * 128
    assert _count("gshard").main == gshard + 2 * 64000 * 1024 + 73 * 2 * 1024
    for name, width, attention, ffn, experts in (
        ("st_moe_l", 1024, 1024, 2816, 32),
        ("st_moe_32b", 5120, 8192, 20480, 64),
    ):
        dense = 24 * 4 * width * attention + (18 + 6) * 3 * width * ffn
        sparse = 6 * experts * (3 * width * ffn + ffn + width)  # a scale and a router row each
        ends = 2 * 32128 * width + (2 * 24 + 6 + 1) * width
        assert _count(name).main == dense + sparse + ends


def test_flags_change_the_smallest_world_size() -> None:
    path = plan.find("olmoe_1b_7b")
    assert plan.planned(path, None, 0, []).world_size == 8
    assert plan.planned(path, None, 0, ["--pipeline-model-parallel-size", "2"]).world_size == 16


def test_list_and_errors() -> None:
    def run(*argv: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(TOOL), *argv]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    listed = run("--list")
    assert listed.returncode == 0, listed.stderr
    assert [line.split()[1] for line in listed.stdout.splitlines()[2:]] == plan.recipe_names()
    assert "6,919,161,856" in listed.stdout
    page = (plan.recipes_folder() / "README.md").read_text(encoding="utf-8")
    assert listed.stdout in page, "paste `python tools/plan.py --list` into examples/README.md"
    unknown = run("olmoe")
    assert unknown.returncode == 2 and "olmoe_1b_7b" in unknown.stderr
