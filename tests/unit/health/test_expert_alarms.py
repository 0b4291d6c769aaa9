"""Alarms of sick experts: raised in the step that completes their number, never by healthy ones."""

import json
from typing import Any

import numpy as np
import pytest

from moetron.moe.config.schema.run import HealthSettings
from moetron.moe.health.events import Event
from moetron.moe.health.expert_alarms import (
    ExpertAlarms,
    ExpertState,
    max_violation,
    spread_of,
)
from tests.unit.health.test_spikes import SERIES

STEPS = 5


def of(**settings: Any) -> ExpertAlarms:
    return ExpertAlarms(
        HealthSettings.model_validate({"expert_alarm_steps": STEPS, **settings}), topk=2
    )


def load(*loads: float) -> dict[str, np.ndarray]:
    return {"layer_1": np.array(loads)}


def raised(
    alarms: ExpertAlarms, loads: dict[str, np.ndarray], steps: int, **biases: float
) -> list[Event]:
    return [event for step in range(1, steps + 1) for event in alarms.judge(step, loads, biases)]


EVEN = load(*[1.0] * 16)


@pytest.mark.parametrize(
    ("loads", "biases", "kind", "experts"),
    [
        (load(0.0, 1.2, *[1.0] * 14), {}, "dead_experts", [0]),
        (load(4.5, *[0.77] * 15), {}, "expert_overload", [0]),
        (load(3.9, 3.9, 3.9, *[0.33] * 13), {}, "router_collapse", []),
        (EVEN, {"layer_1": 1.1}, "expert_bias_range", []),
    ],
)
def test_each_condition_is_found_after_its_steps_once(
    loads: dict[str, np.ndarray], biases: dict[str, float], kind: str, experts: list[int]
) -> None:
    alarms = of(expert_alarm_entropy=0.8, expert_alarm_max_violation=9.0)
    found = raised(alarms, loads, 3 * STEPS, **biases)
    assert [(event.step, event.kind) for event in found] == [(STEPS, kind)]
    assert found[0].values["experts"] == experts
    assert found[0].values["layer"] == "layer_1"
    # Armed again after the condition has ended, not before.
    assert raised(alarms, EVEN, 1, layer_1=0.0) == []
    assert raised(alarms, loads, STEPS - 1, **biases) == []
    assert [event.kind for event in raised(alarms, loads, 1, **biases)] == [kind]


def test_max_violation_is_over_all_layers() -> None:
    loads = {"a": np.array([4.0, 0.0]), "b": np.array([1.0, 1.0])}
    assert max_violation(loads) == 1.5
    alarms = of(expert_alarm_max_violation=1.4, expert_alarm_load=9.0, expert_alarm_entropy=0.0)
    kinds = [event.kind for event in raised(alarms, loads, STEPS)]
    assert kinds == ["dead_experts", "max_violation"]


def test_spread_is_0_for_the_same_experts_and_1_for_all() -> None:
    assert spread_of(np.array([2.0, 2.0, 0.0, 0.0]), 2) == pytest.approx(0.0)
    assert spread_of(np.ones(64), 8) == pytest.approx(1.0)
    half = np.repeat([2.0, 0.0], 8)
    assert spread_of(half, 2) == pytest.approx(np.log(4) / np.log(8))
    assert spread_of(np.ones(2), 2) == 1.0


def test_no_alarms_without_steps_or_experts() -> None:
    assert raised(of(expert_alarm_steps=None), load(0.0, 2.0), 99) == []
    assert raised(of(), {}, 99) == []


def test_a_restored_state_raises_the_same() -> None:
    first, second = of(), of()
    sick = load(0.0, 1.2, *[1.0] * 14)
    assert raised(first, sick, 3) == []
    second.restore(ExpertState.model_validate_json(first.state().model_dump_json()))
    assert [event.kind for event in raised(second, sick, 2)] == ["dead_experts"]


@pytest.mark.parametrize("number", [0, 1])
def test_healthy_runs_have_no_overloaded_experts(number: int) -> None:
    """Recorded quick starts, with the default bounds on loads; they begin with 8 times the mean."""
    series = json.loads(SERIES.read_text(encoding="utf-8"))[number]["expert_load"]
    alarms = ExpertAlarms(HealthSettings(), topk=8)
    for step in range(700):
        loads = {}
        for layer, fullest in series.items():
            load_E = np.full(64, (64 - fullest[step]) / 63)
            load_E[0] = fullest[step]
            loads[layer] = load_E
        assert alarms.judge(step + 1, loads, {}) == []
    assert max(max(fullest) for fullest in series.values()) > 7
