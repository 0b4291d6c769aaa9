"""Comparison of runs, and its report."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moetron.moe.config.command import load
from moetron.moe.verify.parity import (
    Dependence,
    Result,
    Tolerance,
    compare,
    layout_dependent,
    table,
)

TINY = str(Path(__file__).parents[3] / "examples" / "olmoe_1b_7b" / "tiny.yaml")
REFERENCE = Result([4.0, 2.0], [1.0, 0.5], {"a": torch.tensor([3.0, 4.0]), "b": torch.zeros(2)})


def test_worked_differences() -> None:
    other = Result([4.0, 2.2], [1.0, 0.4], {**REFERENCE.gradients, "a": torch.tensor([3.0, 4.5])})
    found = compare(REFERENCE, other)
    assert found.loss == pytest.approx(0.1)
    assert found.grad_norm == pytest.approx(0.2)
    assert (found.gradient, found.parameter) == (pytest.approx(0.1), "a")  # 0.5 of norm 5
    assert found.within(Tolerance(0.11, 0.21, 0.11))
    for bound in (Tolerance(0.09, 1, 1), Tolerance(1, 0.19, 1), Tolerance(1, 1, 0.09)):
        assert not found.within(bound)


def test_equal_runs_have_no_difference() -> None:
    found = compare(REFERENCE, REFERENCE)
    assert (found.loss, found.grad_norm, found.gradient) == (0, 0, 0)
    assert found.within(Tolerance(0, 0, 0))


def test_a_gradient_in_place_of_zero_is_relative_to_the_full_norm() -> None:
    other = {**REFERENCE.gradients, "b": torch.tensor([5e-4, 0.0])}
    found = compare(REFERENCE, replace(REFERENCE, gradients=other))
    assert (found.gradient, found.parameter) == (pytest.approx(1.0), "b")


@pytest.mark.parametrize(
    "other",
    [
        replace(REFERENCE, losses=[4.0]),
        replace(REFERENCE, losses=[4.0, math.nan]),
        replace(REFERENCE, grad_norms=[1.0, math.inf]),
        replace(REFERENCE, gradients={"a": REFERENCE.gradients["a"]}),
        replace(REFERENCE, gradients={**REFERENCE.gradients, "b": torch.zeros(3)}),
        replace(REFERENCE, gradients={**REFERENCE.gradients, "c": torch.zeros(1)}),
        replace(REFERENCE, gradients={**REFERENCE.gradients, "a": torch.tensor([math.nan, 4])}),
    ],
)
def test_missing_or_nan_values_differ(other: Result) -> None:
    assert not compare(REFERENCE, other).within(Tolerance(1e9, 1e9, 1e9))


def test_the_table_names_the_layout_that_differs() -> None:
    off = replace(REFERENCE, losses=[4.0, 2.2])
    found = {"ep2": compare(REFERENCE, REFERENCE), "tp2": compare(REFERENCE, off)}
    lines = table(REFERENCE, found, Tolerance())
    assert "4.000000 to 2.000000" in lines[0]
    assert lines[2].startswith("ep2") and "same" in lines[2]
    assert lines[3].startswith("tp2") and "DIFFERS" in lines[3] and "1.0e-01" in lines[3]


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ([], []),
        (["--moe-expert-capacity-factor", "1.25"], []),
        (
            ["--moe-expert-capacity-factor", "1.25", "--moe-capacity-scope", "rank"],
            ["--moe-capacity-scope rank"],
        ),
        (["--hidden-dropout", "0.1", "--bf16"], ["--hidden-dropout", "--bf16"]),
        (["--vocab-size", "500", "--make-vocab-size-divisible-by", "100"], ["--make-vocab-size"]),
    ],
)
def test_settings_that_depend_on_the_layout(flags: list[str], names: list[str]) -> None:
    settings = load(["--config", TINY, *flags]).settings
    assert settings.model.vocab_size is not None
    found = layout_dependent(settings, settings.model.vocab_size, [1, 2])
    assert len(found) == len(names)
    assert all(one.setting.startswith(name) for one, name in zip(found, names, strict=True))


@pytest.mark.parametrize(
    "flags",
    [
        ["--moe-expert-capacity-factor=1", "--moe-capacity-scope=rank", "--hidden-dropout=0.1"],
        ["--moe-router-load-balancing-type=global_aux_loss", "--attention-dropout=0.1", "--bf16"],
        [
            *("--moe-expert-capacity-factor=1", "--moe-capacity-scope=rank"),
            "--moe-pad-expert-input-to-capacity",
        ],
    ],
)
def test_alternatives_do_not_depend_on_the_layout(flags: list[str]) -> None:
    def dependent(*instead: str) -> list[Dependence]:
        tensor_ranks = ["--world-size=2", "--dry-run", "--tensor-model-parallel-size=2"]
        layout = tensor_ranks if instead else []
        return layout_dependent(load(["--config", TINY, *flags, *instead, *layout]).settings, 1, [])

    found = dependent()
    assert found
    assert dependent(*(flag for one in found for flag in one.instead)) == []


def test_the_time_of_a_step_excludes_the_first() -> None:
    timed = replace(REFERENCE, step_times_s=[9.0, 0.1, 0.2, 0.6])
    found = compare(REFERENCE, timed)
    assert found.step_ms == pytest.approx(200)
    assert "   200.0  same" in table(REFERENCE, {"ep2": found}, Tolerance())[2]
    assert replace(timed, step_times_s=[9.0]).step_ms == pytest.approx(9000)
