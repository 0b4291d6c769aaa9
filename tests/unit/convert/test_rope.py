"""Rotary keys for transformers 4 and 5, in both directions."""

from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
    _yarn_get_concentration_factor,
)

from moetron.common.errors import UserError
from moetron.moe.convert.families.deepseek import DEEPSEEK_V2
from moetron.moe.convert.families.rope import Rope

(ROPE,) = (key for key in DEEPSEEK_V2.keys if isinstance(key, Rope))
YARN: dict[str, Any] = {
    "model.rotary_base": 10_000,
    "attention.rope_type": "yarn",
    "attention.rotary_scaling_factor": 8.0,
    "attention.original_max_position_embeddings": 64,
    "attention.beta_fast": 32.0,
    "attention.beta_slow": 1.0,
    "attention.mscale": 1.0,
    "attention.mscale_all_dim": 0.0,
}
GROWTHS = [(1.0, 0.0), (0.707, 0.707), (0.5, 0.0), (0.0, 0.0), (0.0, 0.8), (1.0, 0.8)]


def test_both_readers_find_a_scaling() -> None:
    config = ROPE.to_hf(YARN)
    assert config["rope_theta"] == 10_000.0
    assert config["rope_parameters"] == {**config["rope_scaling"], "rope_theta": 10_000.0}
    assert config["rope_scaling"]["rope_type"] == "yarn"
    plain = ROPE.to_hf({**YARN, "attention.rope_type": "rope"})
    assert "rope_scaling" not in plain


@pytest.mark.parametrize(("mscale", "all_dim"), GROWTHS)
def test_factors_match_transformers_and_round_trip(mscale: float, all_dim: float) -> None:
    transformers = pytest.importorskip("transformers")
    ours = {**YARN, "attention.mscale": mscale, "attention.mscale_all_dim": all_dim}
    config = ROPE.to_hf(ours)
    made = transformers.DeepseekV2Config(
        hidden_size=32, num_attention_heads=4, qk_rope_head_dim=8, **config
    )
    functions = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS
    _, factor = functions["yarn"](made, torch.device("cpu"))
    assert factor == pytest.approx(_yarn_get_concentration_factor(8.0, mscale, all_dim))
    assert ROPE.from_hf(config) == ours


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"truncate": False}, "truncate"),
        ({"attention_factor": 1.5}, "attention_factor"),
        ({"mscale": None, "mscale_all_dim": 0.7}, "mscale"),
    ],
)
def test_unsupported_scalings_are_refused(changes: dict[str, Any], key: str) -> None:
    scaled = {**ROPE.to_hf(YARN)["rope_parameters"], **changes}
    with pytest.raises(UserError, match=f"with this {key} is not supported"):
        ROPE.from_hf({"rope_parameters": scaled})


def test_a_factor_that_transformers_ignores_is_ignored() -> None:
    scaled = {**ROPE.to_hf(YARN)["rope_parameters"], "mscale": 0.5}
    assert ROPE.from_hf({"rope_parameters": scaled})["attention.mscale"] == 1.0
