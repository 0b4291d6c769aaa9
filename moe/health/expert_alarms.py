"""Alarms of sick experts, from the loads and biases of a step.

Shape suffix: E experts of a layer.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

from moetron.moe.config.schema.run import HealthSettings
from moetron.moe.health.events import Event

Loads = Mapping[str, np.ndarray]
"""Load over mean load of every expert, [E], by layer."""


class ExpertState(BaseModel):
    """State of `ExpertAlarms`, part of a checkpoint: consecutive steps by condition."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    idle: dict[str, list[int]] = {}
    """Steps without a token of every expert, by layer."""
    exceeded: dict[str, int] = {}
    """Steps beyond a bound, by kind of alarm and layer."""


class ExpertAlarms:
    """Alarms for conditions that hold for --expert-alarm-steps consecutive steps.

    An alarm is raised once, in the step that completes their number, and again only after the
    condition has ended.

    Args:
        settings: bounds.
        topk: experts of a token.
    """

    def __init__(self, settings: HealthSettings, topk: int) -> None:
        self._settings, self._topk = settings, topk
        self._idle_E: dict[str, np.ndarray] = {}
        self._exceeded: dict[str, int] = {}

    def judge(self, step: int, loads: Loads, bias_ranges: Mapping[str, float]) -> list[Event]:
        """Return the alarms of a step."""
        if self._settings.expert_alarm_steps is None or not loads:
            return []
        return [
            *self._dead(step, loads),
            *self._bounds(step, loads, bias_ranges),
        ]

    def state(self) -> ExpertState:
        """Return what a resumed run needs to raise the same alarms."""
        idle = {layer: steps_E.tolist() for layer, steps_E in self._idle_E.items()}
        return ExpertState(idle=idle, exceeded=dict(self._exceeded))

    def restore(self, state: ExpertState) -> None:
        """Continue from an earlier state."""
        self._idle_E = {layer: np.array(steps) for layer, steps in state.idle.items()}
        self._exceeded = dict(state.exceeded)

    def _dead(self, step: int, loads: Loads) -> Iterator[Event]:
        for layer, load_E in loads.items():
            before_E = self._idle_E.get(layer, np.zeros(0))
            if len(before_E) != len(load_E):
                before_E = np.zeros(len(load_E), np.int64)
            idle_E = np.where(load_E == 0, before_E + 1, 0)
            self._idle_E[layer] = idle_E
            if dead := np.flatnonzero(idle_E == self._settings.expert_alarm_steps).tolist():
                names = ", ".join(map(str, dead[:8])) + (", ..." if len(dead) > 8 else "")
                yield self._alarm(step, "dead_experts", f"no token for expert {names}", layer, dead)

    def _bounds(self, step: int, loads: Loads, bias_ranges: Mapping[str, float]) -> Iterator[Event]:
        settings = self._settings
        for layer, load_E in loads.items():
            fullest, spread = float(load_E.max()), spread_of(load_E, self._topk)
            if self._holds("expert_overload", layer, fullest > settings.expert_alarm_load):
                text = f"fullest expert {fullest:.2f} x mean"
                yield self._alarm(step, "expert_overload", text, layer, [int(load_E.argmax())])
            if self._holds("router_collapse", layer, spread < settings.expert_alarm_entropy):
                text = f"entropy of the router's choices {spread:.2f}"
                yield self._alarm(step, "router_collapse", text, layer)
        violation = max_violation(loads)
        if self._holds("max_violation", "", violation > settings.expert_alarm_max_violation):
            yield self._alarm(step, "max_violation", f"MaxVio {violation:.2f}")
        for layer, width in bias_ranges.items():
            if self._holds("expert_bias_range", layer, width > settings.expert_alarm_bias_range):
                yield self._alarm(step, "expert_bias_range", f"bias range {width:.3g}", layer)

    def _holds(self, kind: str, layer: str, exceeded: bool) -> bool:
        """Count a condition's consecutive steps; return whether they have just been reached."""
        key = f"{kind} {layer}".rstrip()
        self._exceeded[key] = self._exceeded.get(key, 0) + 1 if exceeded else 0
        return self._exceeded[key] == self._settings.expert_alarm_steps

    def _alarm(
        self, step: int, kind: str, text: str, layer: str | None = None, experts: Sequence[int] = ()
    ) -> Event:
        where = "" if layer is None else f" in {layer.replace('_', ' ')}"
        text += f"{where}, for {self._settings.expert_alarm_steps} steps"
        values = {
            "layer": layer,
            "experts": list(experts),
            "steps": self._settings.expert_alarm_steps,
        }
        return Event(step, kind, "warn", text, values=values)


def spread_of(load_E: np.ndarray, topk: int) -> float:
    """Return how evenly choices are spread: 0: on ``topk`` experts alone, 1: on all experts.

    The entropy H of the choices' distribution over experts between its bounds, which are ln k
    (every token chooses the same k) and ln E: (H - ln k) / (ln E - ln k).
    """
    least, most = math.log(topk), math.log(len(load_E))
    if most <= least or not load_E.sum() > 0:
        return 1.0
    share_E = load_E[load_E > 0] / load_E.sum()
    return float((-(share_E * np.log(share_E)).sum() - least) / (most - least))


def max_violation(loads: Loads) -> float:
    """Return MaxVio of arXiv 2408.15664: mean over layers of max load / mean load - 1."""
    return float(np.mean([load_E.max() for load_E in loads.values()])) - 1.0
