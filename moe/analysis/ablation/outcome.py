"""Outcome of a run of a sweep: stability, loss and speed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from moetron.moe.analysis.ablation.execute import ended
from moetron.moe.analysis.ablation.sweep import Run
from moetron.moe.analysis.curves import read_rows

SPIKE_RATIO, SPIKE_STEPS, LEVEL_STEPS = 1.2, 5, 20
TAIL = 0.1


@dataclass(frozen=True)
class Outcome:
    """Result of a run that has ended."""

    run: Run
    stable: bool
    loss: float
    """Final validation loss; without one, the mean training loss of the last tenth."""
    validated: bool
    """``loss`` is a validation loss."""
    tokens_per_s: float
    """Sum over ranks, median over steps."""
    losses: list[float]
    """Training loss of each step."""
    tokens: list[int]
    """Consumed after each step."""


def outcome(run: Run, output: Path) -> Outcome | None:
    """Return the outcome of ``run`` below ``output``, or None before its end."""
    if not ended(run, output):
        return None
    metrics = read_rows(output / run.name / "metrics.jsonl")
    validation = read_rows(output / run.name / "validation.jsonl")
    losses = [float(row["lm_loss"]) for row in metrics]
    tail = losses[-max(1, round(TAIL * len(losses))) :]
    return Outcome(
        run,
        is_stable(losses),
        float(validation[-1]["validation_loss"]) if validation else sum(tail) / len(tail),
        bool(validation),
        float(np.median([row["tokens_per_s"] for row in metrics])),
        losses,
        [row["tokens"] for row in metrics],
    )


def is_stable(losses: Sequence[float]) -> bool:
    """Return whether all losses are finite and none spikes or climbs for several steps.

    A spike: the mean of 5 consecutive losses is more than 1.2 times the lowest median of 20
    consecutive losses before them. ST-MoE (arXiv 2202.08906, section 3) judges stability by eye.
    """
    if not all(math.isfinite(loss) for loss in losses):
        return False
    if len(losses) < LEVEL_STEPS + SPIKE_STEPS:
        return True
    values = np.array(losses)
    levels = np.minimum.accumulate(np.median(sliding_window_view(values, LEVEL_STEPS), axis=1))
    means = sliding_window_view(values, SPIKE_STEPS).mean(axis=1)
    return bool((means[LEVEL_STEPS:] <= SPIKE_RATIO * levels[:-SPIKE_STEPS]).all())
