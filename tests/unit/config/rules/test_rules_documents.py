"""Rules on attention inside documents."""

from typing import Any

import pytest

from tests.unit.config.config_cases import found

MASK = {"reset_attention_mask": True}


def test_masks_are_accepted() -> None:
    for changes in ({}, {"reset_position_ids": True}, {"context_parallel_size": 1}):
        assert found(1, **MASK, **changes) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bidirectional_prefix": True, "mock_data": True}, "exclude each other"),
        ({"attention_backend": "unfused"}, "--attention-backend sdpa"),
        ({"mtp_num_layers": 2}, "--mtp-num-layers 1"),
        ({"data_path": ["a"], "objective": "ul2"}, "use causal or fim"),
    ],
)
def test_what_it_cannot_do(changes: dict[str, Any], words: str) -> None:
    lines = found(1, **{**MASK, **changes})
    assert any("--reset-attention-mask" in line and words in line for line in lines)


def test_positions_restart_with_the_mask_only() -> None:
    (line,) = found(1, reset_position_ids=True)
    assert "--reset-position-ids needs --reset-attention-mask" in line


@pytest.mark.parametrize("name", ["micro_batch_size", "context_parallel_size"])
def test_transformer_engine_packs_one_row(name: str) -> None:
    ranks = 2 if name == "context_parallel_size" else 1
    lines = found(ranks, "cuda", te=True, **MASK, **{name: 2, "global_batch_size": 4})
    assert any(
        "Transformer Engine" in line and "--transformer-impl local" in line for line in lines
    )
    local = found(
        ranks,
        "cuda",
        te=True,
        transformer_impl="local",
        **MASK,
        **{name: 2, "global_batch_size": 4},
    )
    assert not [line for line in local if "--reset-attention-mask" in line]


def test_shapes_of_a_graph_are_fixed() -> None:
    lines = found(1, "cuda", te=True, cuda_graph_impl="transformer_engine", **MASK)
    assert any("--reset-attention-mask" in line and "--cuda-graph-impl" in line for line in lines)
