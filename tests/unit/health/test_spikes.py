"""Spikes: the window against numpy, policies and their limits, healthy runs without alarms."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moetron.moe.config.schema.run import HealthSettings
from moetron.moe.health.events import Event, NotFiniteError, SpikeError
from moetron.moe.health.spikes import (
    Place,
    SpikeDetector,
    SpikeState,
    StepValues,
    Verdict,
    outlying,
)
from moetron.moe.health.window import Window

SERIES = Path(__file__).with_name("healthy_series.json")
"""Loss, gradient norm and fullest experts of two quick starts of 700 steps on other texts."""
NAN = float("nan")


def values(loss: float, grad_norm: float = 1.0) -> StepValues:
    return StepValues(loss, grad_norm, [loss, loss], [1.0, 1.0], {"web": loss})


def place(step: int) -> Place:
    return Place(step, 8 * (step - 1), 8 * step)


def judged(detector: SpikeDetector, steps: int, first: int = 1) -> None:
    """Let the detector see healthy steps."""
    for step in range(first, first + steps):
        verdict, _ = detector.judge(place(step), values(5 + 0.1 * (step % 3), 1 + 0.1 * (step % 2)))
        assert verdict == Verdict()


def of(policy: str, check_finite: bool = True, **settings: Any) -> SpikeDetector:
    chosen = HealthSettings.model_validate({"spike_policy": policy, **settings})
    return SpikeDetector(chosen, check_finite)


def test_statistics_are_those_of_olmo_core() -> None:
    """Over the last 128 values without the newest, from 64 on, Bessel-corrected."""
    series = np.random.default_rng(0).normal(5, 0.1, 300).tolist()
    window = Window(128, 6.0)
    for n, value in enumerate(series):
        found = window.compare(value)
        before = np.array(series[max(0, n - 128) : n])
        assert (found is None) == (n < 64)
        if found is not None:
            assert found.mean == pytest.approx(before.mean())
            assert found.deviations == pytest.approx(
                (value - before.mean()) / before.std(ddof=1), abs=1e-9
            )
        window.add(value)
    assert len(window.state()) == 128


def test_a_constant_window_has_no_spikes_and_bad_values_do_not_enter_it() -> None:
    window = Window(8, 6.0)
    for value in (2.0,) * 6 + (NAN, math.inf):
        window.add(value)
    assert window.state() == [2.0] * 6
    assert window.compare(100.0) is None


def test_events_name_the_loss_that_is_trained() -> None:
    detector = of("warn")
    judged(detector, 100)
    spike = replace(values(9.0), loss_name="preference_loss")
    (event,) = detector.judge(place(101), spike)[0].events
    assert event.text.startswith("preference_loss 9 is ")
    bad = replace(values(NAN), loss_name="preference_loss")
    (event,) = detector.judge(place(102), bad)[0].events
    assert event.text.startswith("preference_loss is nan")


def test_a_spike_needs_six_deviations_and_a_norm_five_times_the_mean() -> None:
    detector = of("skip")
    judged(detector, 100)
    assert detector.judge(place(101), values(5.2, 4.9))[0].action == "none"
    [norm] = detector.judge(place(102), values(5.2, 1000.0))[0].events
    assert (norm.kind, norm.action) == ("grad_norm_spike", "skip")
    verdict, metrics = detector.judge(place(103), values(9.0))
    assert [event.kind for event in verdict.events] == ["loss_spike"]
    assert verdict.events[0].samples == (816, 824)
    assert metrics["skipped_steps"] == 2
    assert metrics["spike_score"] == 2 / 103
    assert metrics["loss_deviations"] > 6
    # A spike enters the window: the second of two equal ones is nearer.
    _, again = detector.judge(place(104), values(9.0))
    assert again["loss_deviations"] < metrics["loss_deviations"]


@pytest.mark.parametrize(
    ("policy", "check", "on_nan", "on_spike"),
    [
        ("warn", True, "stop", "warn"),
        ("warn", False, "warn", "warn"),
        ("skip", True, "skip", "skip"),
        ("skip", False, "warn", "skip"),
        ("stop", True, "stop", "stop"),
        ("rollback", True, "rollback", "rollback"),
    ],
)
def test_policies(policy: str, check: bool, on_nan: str, on_spike: str) -> None:
    for bad, expected in (
        (values(NAN), on_nan),
        (values(5.0, math.inf), on_nan),
        (values(50.0), on_spike),
    ):
        detector = of(policy, check)
        judged(detector, 70)
        verdict, _ = detector.judge(place(71), bad)
        assert verdict.action == expected
        assert verdict.updates == (expected == "warn")
        assert [event.action for event in verdict.events] == [expected]


def test_too_many_skips_in_a_row_stop_the_run_with_a_cause() -> None:
    detector = of("skip", spike_max_skips=3)
    actions = [detector.judge(place(step), values(NAN))[0].action for step in range(1, 5)]
    assert actions == ["skip"] * 3 + ["stop"]
    detector = of("skip", spike_max_skips=3)
    for step in range(1, 20):
        assert detector.judge(place(step), values(NAN if step % 4 else 5.0))[0].action != "stop"


def test_too_many_rollbacks_stop_the_run() -> None:
    detector = of("rollback", spike_max_rollbacks=2)
    detector.rollbacks = 1
    assert detector.judge(place(1), values(NAN))[0].action == "rollback"
    detector.rollbacks = 2
    verdict, _ = detector.judge(place(1), values(NAN))
    assert verdict.action == "stop"
    assert isinstance(verdict.error("do something"), NotFiniteError)
    assert str(verdict.error("do something")).endswith("in step 1; do something")


def test_errors_name_their_kind() -> None:
    assert isinstance(Verdict("stop", [Event(3, "loss_spike", "stop", "")]).error(""), SpikeError)


def test_a_restored_detector_decides_the_same() -> None:
    """Also through JSON, as in a checkpoint."""
    series = np.random.default_rng(1).normal(5, 0.1, 200).tolist()
    straight, first = of("skip", spike_threshold=2.0), of("skip", spike_threshold=2.0)
    for step, value in enumerate(series[:120], start=1):
        straight.judge(place(step), values(value))
        first.judge(place(step), values(value))
    second = of("skip", spike_threshold=2.0)
    second.restore(SpikeState.model_validate_json(first.state().model_dump_json()))
    for step, value in enumerate(series[120:], start=121):
        assert straight.judge(place(step), values(value)) == second.judge(
            place(step), values(value)
        )
    assert straight.skipped_steps > 0


def test_ranks_that_stand_out() -> None:
    assert outlying([1.0, NAN, None, math.inf]) == [1, 3]
    assert outlying([1.0, 1000.0]) == [1]
    assert outlying([5.0, 5.1, 4.9]) == []
    assert outlying([]) == outlying([None]) == []


def test_an_event_is_a_line_of_plain_json() -> None:
    event = Event(
        3, "non_finite", "skip", "", (8, 16), ["web"], [1], {"loss": NAN, "x": [math.inf]}
    )
    row = json.loads(json.dumps(event.row(), allow_nan=False))
    assert row["values"] == {"loss": "nan", "x": ["inf"]}
    assert row["samples"] == [8, 16]
    assert "extra" not in row


@pytest.mark.parametrize("number", [0, 1])
def test_healthy_runs_raise_no_alarm(number: int) -> None:
    """Recorded quick starts; without the ratio each would have two gradient norms as spikes."""
    series = json.loads(SERIES.read_text(encoding="utf-8"))[number]
    alarms: dict[float, int] = {}
    for ratio in (5.0, 1e-9):
        detector = of("warn", spike_grad_norm_ratio=ratio)
        pairs = zip(series["loss"], series["grad_norm"], strict=True)
        verdicts = [
            detector.judge(place(step), values(*pair))[0] for step, pair in enumerate(pairs, 1)
        ]
        assert len(verdicts) == 700
        alarms[ratio] = sum(verdict.action != "none" for verdict in verdicts)
    assert alarms == {5.0: 0, 1e-9: 2}
