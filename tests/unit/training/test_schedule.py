"""Learning rate: values of published recipes, shapes, continuity."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetron.moe.checkpoint.position import Progress
from moetron.moe.config.schema.derived import stage_at
from moetron.moe.training.schedule import LearningRate
from tests.unit.training.training_cases import settings


def _rate(train_iters: int = 100, **fields: Any) -> LearningRate:
    return LearningRate.of(settings(training={"train_iters": train_iters}, learning_rate=fields))


def _at_step(rate: LearningRate, step: int) -> float:
    return rate.at(Progress(step, step * 8, step * 32))


OLMOE = {
    "lr": 4e-4,
    "min_lr": 4e-5,
    "lr_warmup_init": 4e-5,
    "lr_warmup_tokens": 10_485_760_000,
    "lr_decay_tokens": 5_000_000_000_000,
}
OLMOE_STEP_TOKENS = 1024 * 4096


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (0, 4e-5),
        (1250 * OLMOE_STEP_TOKENS, 2.2e-4),
        (2500 * OLMOE_STEP_TOKENS, 4e-4),
        ((5_000_000_000_000 + 10_485_760_000) // 2, 2.2e-4),
        (5_000_000_000_000, 4e-5),
        (5_033_000_000_000, 4e-5),
    ],
)
def test_olmoe_pretraining(tokens: int, expected: float) -> None:
    assert _rate(**OLMOE).at(Progress(0, 0, tokens)) == pytest.approx(expected, rel=1e-12)


def test_olmoe_annealing_reaches_zero() -> None:
    rate = _rate(23_842, lr=4e-5, lr_decay_style="linear")
    assert _at_step(rate, 0) == 4e-5
    assert _at_step(rate, 11_921) == pytest.approx(2e-5, rel=1e-12)
    assert _at_step(rate, 23_842) == 0.0


def test_openmoe_is_flat_then_inverse_root() -> None:
    rate = _rate(
        500_000,
        lr=0.01,
        lr_warmup_init=0.01,
        lr_warmup_iters=10_000,
        lr_decay_style="inverse-square-root",
    )
    assert [_at_step(rate, step) for step in (0, 5000, 10_000)] == [0.01] * 3
    assert _at_step(rate, 40_000) == pytest.approx(0.005, rel=1e-12)


@pytest.mark.parametrize(
    ("style", "half_way"),
    [
        ("linear", 0.5),
        ("cosine", 0.5),
        ("exponential", math.sqrt(2) - 1),
        ("minus_sqrt", 1 - math.sqrt(0.5)),
    ],
)
def test_wsd_holds_the_peak_until_its_final_decay(style: str, half_way: float) -> None:
    rate = _rate(
        lr=2.0,
        min_lr=1.0,
        lr_warmup_iters=10,
        lr_decay_style="WSD",
        lr_wsd_decay_iters=20,
        lr_wsd_decay_style=style,
    )
    assert _at_step(rate, 5) == 1.0
    assert [_at_step(rate, step) for step in (10, 50, 80)] == [2.0] * 3
    assert _at_step(rate, 90) == pytest.approx(1 + half_way, rel=1e-12)
    assert [_at_step(rate, step) for step in (100, 1000)] == [1.0] * 2


def test_constant_never_decays() -> None:
    rate = _rate(lr=3.0, min_lr=1.0, lr_decay_style="constant", lr_warmup_iters=2)
    assert [_at_step(rate, step) for step in (0, 1, 2, 100, 1000)] == [0.0, 1.5, 3.0, 3.0, 3.0]


def test_tokens_count_a_ramp_in_the_batch_size() -> None:
    """8 steps of 4 samples, then 2 of 8: the decay in tokens ends with the run's last token."""
    run = settings(
        training={"train_iters": 10, "rampup_batch_size": (4, 4, 32)},
        learning_rate={"lr": 1.0, "lr_decay_style": "linear", "lr_warmup_tokens": 0},
    )
    tokens = (8 * 4 + 2 * 8) * 4
    assert LearningRate.of(run).at(Progress(9, 0, tokens // 2)) == 0.5
    assert LearningRate.of(run).at(Progress(10, 0, tokens)) == 0.0


@given(
    style=st.sampled_from(["constant", "linear", "cosine", "WSD", "inverse-square-root"]),
    warmup=st.integers(0, 40),
    steps=st.lists(st.integers(0, 200), min_size=2, max_size=2),
)
def test_rates_stay_between_their_bounds_and_never_rise_after_the_warm_up(
    style: str, warmup: int, steps: list[int]
) -> None:
    rate = _rate(
        lr=1.0,
        min_lr=0.1,
        lr_warmup_init=0.2,
        lr_warmup_iters=warmup,
        lr_decay_style=style,
        lr_wsd_decay_iters=30,
    )
    first, second = (_at_step(rate, step) for step in sorted(steps))
    assert all(0.1 <= value <= 1.0 for value in (first, second))
    if min(steps) >= warmup:
        assert second <= first


def test_a_stage_may_have_its_own_learning_rate() -> None:
    """OLMoE in one run: cosine to a tenth, then from there linearly to zero in the last stage."""
    anneal = {"data_path": ["a"], "seed": 42, "learning_rate": {"lr": 0.1}}
    run = settings(
        training={"train_iters": 10},
        data={"stages": [{"data_path": ["a"], "until_tokens": 6 * 32}, anneal]},
        learning_rate={"lr": 1.0, "min_lr": 0.1, "lr_decay_iters": 6},
    )
    rate = LearningRate.of(run)
    found = [_at_step(rate, step) for step in range(11)]
    assert found[0] == 1.0 and found[3] == pytest.approx(0.55)
    assert found[6:10] == pytest.approx([0.1, 0.075, 0.05, 0.025])
    assert [stage_at(run, sample) for sample in (0, 47, 48, 80)] == [0, 0, 1, 1]


@pytest.mark.parametrize(("style", "middle"), [("constant", 4.0), ("linear", 3.0), ("cosine", 3.0)])
def test_shapes_of_a_stage(style: str, middle: float) -> None:
    rate = {"lr": 4.0, "min_lr": 2.0, "lr_decay_style": style}
    stages = [
        {"data_path": ["a"], "until_tokens": 256, "learning_rate": rate},
        {"data_path": ["a"]},
    ]
    schedule = LearningRate.of(settings(data={"stages": stages}))
    assert _at_step(schedule, 0) == 4.0 and _at_step(schedule, 4) == pytest.approx(middle)
    assert _at_step(schedule, 8) < 1.0  # the run's schedule again
