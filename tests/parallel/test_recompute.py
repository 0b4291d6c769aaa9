"""Recomputed activations change no bit of losses, counts or gradients, in any layout."""

from typing import Any

import pytest
import torch

from tests.parallel.support.steps import Case, run_all

TP, EP, PP = (f"{kind}_model_parallel_size" for kind in ("tensor", "expert", "pipeline"))
MOE = {"moe_shared_expert_intermediate_size": 16}


def _full(method: str, layers: int) -> dict[str, Any]:
    return {
        "recompute_granularity": "full",
        "recompute_method": method,
        "recompute_num_layers": layers,
    }


def _selective(*modules: str) -> dict[str, Any]:
    return {"recompute_granularity": "selective", "recompute_modules": list(modules)}


WAYS = [
    _full("uniform", 1),
    _full("uniform", 2),
    _full("block", 1),
    {"recompute_granularity": "selective"},
    _selective("moe"),
    _selective("mlp", "layernorm"),
    _selective("shared_experts", "core_attn"),
]


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        pytest.param(1, {}, id="one rank"),
        pytest.param(2, {PP: 2}, id="PP2"),
        pytest.param(2, {TP: 2, EP: 2, "expert_tensor_parallel_size": 1}, id="TP2 EP2"),
        pytest.param(4, {PP: 2, EP: 2}, id="PP2 EP2", marks=pytest.mark.slow),
    ],
)
def test_every_way_to_recompute_gives_the_same_bits(ranks: int, layout: dict[str, Any]) -> None:
    kept, *recomputed = run_all(ranks, [Case({**layout, **way}, MOE) for way in ({}, *WAYS)], None)
    for result, way in zip(recomputed, WAYS, strict=True):
        for name in ("loss", "auxiliary"):
            assert result[name] == kept[name], way
        for name in ("chosen", "kept"):
            assert torch.equal(result[name], kept[name]), way
        for name, gradient in kept["gradients"].items():
            assert torch.equal(result["gradients"][name], gradient), (way, name)
