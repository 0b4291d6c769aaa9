"""docs/features.md against the settings and the tests that it names."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest

from moetron.moe.config.schema.field import flag_name
from moetron.moe.config.schema.settings import fields

ROOT = Path(__file__).resolve().parents[2]
STATUSES = {"executed", "emulated", "constructed", "absent"}
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs/features.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and not line.startswith("| feature")
]
CHOICES = (
    "moe_token_dispatcher_type",
    "moe_capacity_scope",
    "moe_token_drop_policy",
    "moe_router_type",
    "moe_router_score_function",
    "moe_router_load_balancing_type",
    "moe_global_aux_loss_counts",
    "fp8_format",
    "fp8_recipe",
    "transformer_impl",
    "attention_backend",
    "recompute_granularity",
)


def test_every_row_has_a_status_and_a_test_that_exists() -> None:
    assert len(ROWS) > 25
    for feature, status, test in ROWS:
        assert status in STATUSES, feature
        assert (test == "") == (status == "absent"), feature
        assert not test or (ROOT / test.strip("`")).is_file(), test


def _options(annotation: Any) -> set[str]:
    """Words of a Literal, inside an Optional or not."""
    return {
        word
        for option in get_args(annotation)
        for word in ([option] if isinstance(option, str) else get_args(option))
    }


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_has_one_row(name: str) -> None:
    (annotation,) = (field.annotation for _, found, field in fields() if found == name)
    options = _options(annotation)
    assert len(options) > 1
    rows = [feature for feature, _, _ in ROWS if f"`{flag_name(name)}`" in feature]
    named = [option for option in options for row in rows if f"`{option}`" in _after(row, name)]
    assert sorted(named) == sorted(options)


def _after(row: str, name: str) -> str:
    """The words that follow a flag in a row, up to the next flag."""
    return re.split(r"`--", row.split(f"`{flag_name(name)}`", 1)[1])[0]
