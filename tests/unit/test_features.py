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
    "moe_experts_impl",
    "cross_entropy_fusion_impl",
)


DEFAULTS = {name: field.default for _, name, field in fields()}


def test_every_row_has_a_status_and_a_test_that_exists() -> None:
    assert len(ROWS) > 25
    for feature, status, test in ROWS:
        assert status in STATUSES, feature
        assert (test == "") == (status == "absent"), feature
        assert not test or (ROOT / test.strip("`")).is_file(), test


@pytest.mark.parametrize("row", [row for row in ROWS if row[1] in ("executed", "emulated")])
def test_what_is_called_executed_is_named_by_its_test(row: list[str]) -> None:
    """Each flag and option of the row occurs in the test that is said to run it."""
    feature, _, test = row
    source = _source(ROOT / test.strip("`"))
    assert "def test_" in source
    on_gpu = "(H100)" in feature  # run once, as the page says; CI has no GPU
    assert on_gpu == ("pytestmark = pytest.mark.gpu" in source)
    words = re.findall(r"`([^`]+)`", feature)
    for word, following in zip(words, [*words[1:], "--"], strict=False):
        flag, *values = word.split()
        if flag.startswith("--"):
            name = flag.removeprefix("--").replace("-", "_")
            default = DEFAULTS[name]
            if following.startswith("--") and not values:  # its options are not spelled out
                values = [name]
        elif flag in OPTIONS:
            values = [flag]
        for value in values:
            spelled = (value, f"--{value.replace('_', '-')}")
            named = any(form in source for form in spelled)
            assert named or value == default, f"{test} does not name {value}"


def _source(path: Path, seen: frozenset[Path] = frozenset()) -> str:
    """Text of a test file and of the helpers below tests/ that it imports."""
    text = path.read_text(encoding="utf-8")
    for module in re.findall(r"^from (tests\.[\w.]+) import", text, re.MULTILINE):
        helper = ROOT / (module.replace(".", "/") + ".py")
        if helper not in seen:
            text += _source(helper, seen | {path, helper})
    return text


def _options(annotation: Any) -> set[str]:
    """Words of a Literal, inside an Optional or not."""
    return {
        word
        for option in get_args(annotation)
        for word in ([option] if isinstance(option, str) else get_args(option))
    }


OPTIONS = {
    word for _, name, field in fields() if name in CHOICES for word in _options(field.annotation)
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
