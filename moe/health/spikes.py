"""Spikes and values that are not finite: one decision before the update, equal on all ranks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from moetron.moe.config.schema.run import HealthSettings
from moetron.moe.health.events import Event, NotFiniteError, SpikeError
from moetron.moe.health.window import Comparison, Window

Action = Literal["none", "warn", "skip", "stop", "rollback"]
SCORE_STEPS = 10_000
"""Steps over which the spike score is taken."""
OUTLYING = 3.0
"""A rank stands out above this multiple of the lower median of all ranks."""


@dataclass(frozen=True)
class StepValues:
    """What a step's forward and backward passes gave, equal on all ranks."""

    loss: float
    """The loss that is trained: mean over the loss tokens, or preferences, of the global batch."""
    grad_norm: float
    """Of the full gradient, before clipping."""
    rank_losses: Sequence[float | None]
    """The same of each rank; None: it computes no loss."""
    rank_grad_norms: Sequence[float]
    """Norm of each rank's gradients before their reduction, in the units that the schedule leaves
    them in; empty: not measured."""
    source_losses: Mapping[str, float]
    """Cross-entropy in nats per token, also where preferences are trained."""
    loss_name: str = "lm_loss"
    """Name of ``loss`` in metrics.jsonl."""


@dataclass(frozen=True)
class Place:
    """A step's number and samples [first, end)."""

    step: int
    first_sample: int
    end_sample: int


@dataclass(frozen=True)
class Verdict:
    """Decision on a step."""

    action: Action = "none"
    events: list[Event] = field(default_factory=list)

    @property
    def updates(self) -> bool:
        """Return whether the weights are updated."""
        return self.action in ("none", "warn")

    def error(self, remedy: str) -> Exception:
        """Return the error that stops the run."""
        event = self.events[0]
        kind = NotFiniteError if event.kind == "non_finite" else SpikeError
        return kind(f"{event.text} in step {event.step}; {remedy}")


class SpikeState(BaseModel):
    """State of a `SpikeDetector`, part of a checkpoint."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    loss: list[float] = []
    grad_norm: list[float] = []
    spike_steps: list[int] = []
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    rollbacks: int = 0


class SpikeDetector:
    """Judge of every step's loss and gradient norm; a pure function of the values so far."""

    def __init__(self, settings: HealthSettings, check_finite: bool) -> None:
        length, threshold = settings.spike_window, settings.spike_threshold
        self._settings, self._check_finite = settings, check_finite
        self._windows = {
            "loss": Window(length, threshold),
            "grad_norm": Window(length, threshold, settings.spike_grad_norm_ratio),
        }
        self._spike_steps: list[int] = []
        self.skipped_steps = 0
        self._skipped_in_a_row = 0
        self.rollbacks = 0

    def judge(self, place: Place, values: StepValues) -> tuple[Verdict, dict[str, float]]:
        """Decide on a step; return the verdict and the metrics of it."""
        found = {
            name: window.compare(getattr(values, name)) for name, window in self._windows.items()
        }
        kinds = self._kinds(values, found)
        action = self._action(kinds)
        events = [_event(place, kind, action, values, found) for kind in kinds]
        for name, window in self._windows.items():
            window.add(getattr(values, name))
        self._count(place.step, bool(kinds), action)
        return Verdict(action, events), self._metrics(place.step, found)

    def preview(self, values: StepValues) -> tuple[bool, bool]:
        """Return whether a step is bad, and whether bad values end the run; changes nothing.

        For an error that a drill injects, as for a value that is not finite.
        """
        found = {
            name: window.compare(getattr(values, name)) for name, window in self._windows.items()
        }
        kinds = self._kinds(values, found)
        return bool(kinds), self._action(kinds or ["non_finite"]) == "stop"

    def state(self) -> SpikeState:
        """Return what a resumed run needs to decide the same."""
        return SpikeState(
            loss=self._windows["loss"].state(),
            grad_norm=self._windows["grad_norm"].state(),
            spike_steps=list(self._spike_steps),
            skipped_steps=self.skipped_steps,
            skipped_in_a_row=self._skipped_in_a_row,
            rollbacks=self.rollbacks,
        )

    def restore(self, state: SpikeState) -> None:
        """Continue from an earlier state."""
        self._windows["loss"].restore(state.loss)
        self._windows["grad_norm"].restore(state.grad_norm)
        self._spike_steps = list(state.spike_steps)
        self.skipped_steps, self._skipped_in_a_row = state.skipped_steps, state.skipped_in_a_row
        self.rollbacks = state.rollbacks

    def _kinds(self, values: StepValues, found: Mapping[str, Comparison | None]) -> list[str]:
        if not (math.isfinite(values.loss) and math.isfinite(values.grad_norm)):
            return ["non_finite"]
        return [
            f"{name}_spike"
            for name, window in self._windows.items()
            if window.is_spike(getattr(values, name), found[name])
        ]

    def _action(self, kinds: Sequence[str]) -> Action:
        """Return what follows from findings.

        A value that is not finite would destroy every weight, so that under ``warn`` it stops the
        run, unless --no-check-for-nan-in-loss-and-grad asks to update anyway.
        """
        if not kinds:
            return "none"
        action: Action = self._settings.spike_policy
        if "non_finite" in kinds:
            if not self._check_finite:
                return "warn"
            action = "stop" if action == "warn" else action
        if action == "skip" and self._skipped_in_a_row >= self._settings.spike_max_skips:
            return "stop"
        if action == "rollback" and self.rollbacks >= self._settings.spike_max_rollbacks:
            return "stop"
        return action

    def _count(self, step: int, is_spike: bool, action: Action) -> None:
        if is_spike:
            self._spike_steps.append(step)
        self._spike_steps = [each for each in self._spike_steps if each > step - SCORE_STEPS]
        skipped = action == "skip"
        self.skipped_steps += skipped
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0

    def _metrics(self, step: int, found: Mapping[str, Comparison | None]) -> dict[str, float]:
        """Return the share of spikes among the last steps, and the deviations of this one."""
        metrics = {"spike_score": len(self._spike_steps) / min(max(step, 1), SCORE_STEPS)}
        for name, each in found.items():
            if each is not None:
                metrics[f"{name}_deviations"] = each.deviations
        if self.skipped_steps:
            metrics["skipped_steps"] = self.skipped_steps
        return metrics


def _event(
    place: Place,
    kind: str,
    action: Action,
    values: StepValues,
    found: Mapping[str, Comparison | None],
) -> Event:
    sources = values.source_losses
    ranks = outlying(values.rank_losses) if kind == "loss_spike" else standing_out(values)
    numbers: dict[str, Any] = {"loss": values.loss, "grad_norm": values.grad_norm}
    if kind == "non_finite":
        named = ", ".join(map(str, ranks))
        where = f" (of rank{'s' if len(ranks) > 1 else ''} {named})" if ranks else ""
        text = f"{values.loss_name} is {values.loss}, the gradient norm {values.grad_norm}{where}"
        sources = {name: loss for name, loss in sources.items() if not math.isfinite(loss)}
    else:
        name = kind.removesuffix("_spike")
        compared = found[name]
        assert compared is not None
        numbers |= {"mean": compared.mean, "deviations": compared.deviations}
        shown = values.loss_name if name == "loss" else "gradient norm"
        text = (
            f"{shown} {getattr(values, name):.4g} is {compared.deviations:.1f} deviations "
            f"above the mean {compared.mean:.4g}"
        )
    numbers |= {
        "rank_losses": list(values.rank_losses),
        "rank_grad_norms": list(values.rank_grad_norms),
        "source_losses": dict(values.source_losses),
    }
    return Event(
        place.step,
        kind,
        action,
        text,
        (place.first_sample, place.end_sample),
        sorted(sources or values.source_losses),
        ranks,
        numbers,
    )


def standing_out(values: StepValues) -> list[int]:
    """Return the ranks that stand out by their losses or gradient norms."""
    return sorted({*outlying(values.rank_losses), *outlying(values.rank_grad_norms)})


def outlying(values: Sequence[float | None]) -> list[int]:
    """Return the ranks whose values are not finite; if none is, those far above the others."""
    known = {rank: value for rank, value in enumerate(values) if value is not None}
    if bad := [rank for rank, value in known.items() if not math.isfinite(value)]:
        return bad
    if not known:
        return []
    usual = sorted(known.values())[(len(known) - 1) // 2]
    return [rank for rank, value in known.items() if value > OUTLYING * usual]
