"""Rules on fine-tuning on chats."""

from typing import Any

import pytest

from tests.unit.config.config_cases import found

CHATS: dict[str, Any] = {"sft": True, "mock_data": False, "data_path": ["chats"]}


def test_accepted() -> None:
    assert found(2, **CHATS, context_parallel_size=2) == []
    assert found(1, **CHATS, sft_packing=False, sft_loss_normalisation="sample") == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data_path": ["0.5", "a", "0.5", "b"]}, "an epoch has each chat once"),
        ({"eod_mask_loss": True}, "exclude each other: leave it out"),
        ({"reset_attention_mask": True}, "exclude each other: leave it out"),
        ({"mock_data": True}, "exclude each other: leave it out"),
        ({"calculate_per_token_loss": False}, "--calculate-per-token-loss"),
        ({"attention_backend": "unfused"}, "--attention-backend sdpa"),
        ({"mtp_num_layers": 2}, "--mtp-num-layers 1"),
        (
            {"moe_router_type": "expert_choice", "moe_expert_capacity_factor": 1.0},
            "it would choose among padding",
        ),
        ({"moe_router_load_balancing_type": "sinkhorn"}, "it would balance padding"),
    ],
)
def test_refused(changes: dict[str, Any], words: str) -> None:
    lines = found(1, **{**CHATS, **changes})
    assert any("--sft" in line and words in line for line in lines), lines


DPO = {**CHATS, "preference_loss": "dpo", "load": "base", "save": "run"}


def test_preferences_are_accepted() -> None:
    assert found(2, **DPO, context_parallel_size=2) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"load": None}, "needs --load"),
        ({"mtp_num_layers": 1}, "exclude each other"),
        ({"sft_loss_normalisation": "sample"}, "exclude each other"),
        ({"attention_dropout": 0.1}, "the reference has none"),
    ],
)
def test_preferences_refused(changes: dict[str, Any], words: str) -> None:
    lines = found(1, **{**DPO, **changes})
    assert any("--preference-loss dpo" in line and words in line for line in lines), lines


@pytest.mark.parametrize(
    "changes",
    [{"preference_loss": "dpo"}, {"sft_packing": False}, {"sft_loss_normalisation": "sample"}],
)
def test_options_need_the_switch(changes: dict[str, Any]) -> None:
    (line,) = found(1, **changes)
    assert "needs --sft" in line


def test_transformer_engine_packs_one_row() -> None:
    lines = found(1, "cuda", te=True, **CHATS)
    assert any("--sft in layers of Transformer Engine" in line for line in lines)


@pytest.mark.parametrize(
    ("loss", "changes", "words"),
    [
        ("kto", {"preference_label_smoothing": 0.1}, "dpo or dpo_norm"),
        ("dpo", {"preference_desirable_weight": 2.0}, "kto"),
        ("dpo", {"preference_undesirable_weight": 2.0}, "kto"),
        (None, {"preference_beta": 0.5}, "dpo or dpo_norm or kto"),
        (None, {"preference_reference_load": "."}, "dpo or dpo_norm or kto"),
    ],
)
def test_options_need_a_loss_that_reads_them(
    loss: str | None, changes: dict[str, Any], words: str
) -> None:
    (line,) = found(1, **{**DPO, "preference_loss": loss, **changes})
    assert f"needs --preference-loss {words}: " in line


def test_a_reference_of_its_own() -> None:
    changes = {**DPO, "preference_loss": "kto", "preference_reference_load": "base"}
    assert found(1, **changes) == []
    lines = found(1, **{**changes, "load": None, "save": None})
    assert lines == ["--preference-reference-load base needs --load: the model to train"]
