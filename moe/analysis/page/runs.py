"""Reading of run folders for the page."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moetron.common.errors import UserError
from moetron.common.json_files import read_object
from moetron.moe.analysis.curves import read_rows
from moetron.moe.analysis.figures import RESULT
from moetron.moe.checkpoint import run_folder as checkpoint_folder
from moetron.moe.health.events import FILE as EVENTS
from moetron.moe.health.events import read_events

Row = dict[str, Any]
POINTS = 1_000
"""Largest number of points per curve; each is the mean of equally many steps."""


@dataclass(frozen=True)
class Stage:
    """Stage of the data, in tokens of the run."""

    first_token: int
    last_token: int
    objective: str


@dataclass(frozen=True)
class Run:
    """Content of a run folder."""

    name: str
    """Folder and its parent: ``quickstart/run``."""
    metrics: list[Row]
    """Rows of metrics.jsonl, one per step."""
    validation: list[Row]
    settings: dict[str, dict[str, Any]]
    """Settings of the latest checkpoint; empty before the first."""
    checkpoints: list[int]
    """Steps."""
    analysis: Row | None
    """Result of tools/analyze_routing.py."""
    starts: list[Row] = field(default_factory=list)
    """Rows of starts.jsonl, one per start; empty for runs of older versions."""
    events: list[Row] = field(default_factory=list)
    """Rows of events.jsonl: what the health checks found."""

    @property
    def stages(self) -> list[Stage]:
        """Return the data stages that the run reached, at least one."""
        data, end = self.settings.get("data", {}), self.metrics[-1]["tokens"]
        first, stages = 0, []
        for stage in data.get("stages") or [{"objective": data.get("objective", "causal")}]:
            last = min(stage.get("until_tokens") or end, end)
            if first < end:
                stages.append(Stage(first, last, stage["objective"]))
            first = last
        return stages

    def tail(self, name: str, share: float = 0.1) -> np.ndarray:
        """Return the values of ``name`` in the last ``share`` of the steps that have it."""
        values = [row[name] for row in self.metrics if name in row]
        return np.array(values[-max(1, round(len(values) * share)) :], dtype=np.float64)

    def layers(self, name: str) -> list[str]:
        """Return the keys of a per-layer metric."""
        return next((list(row[name]) for row in self.metrics if name in row), [])


def read(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        UserError: the folder has no metrics.jsonl with a step in it.
    """
    rows = read_rows(folder / "metrics.jsonl")
    metrics = [row for row in rows if math.isfinite(row["lm_loss"])]  # others: skipped steps
    if not metrics:
        raise UserError(
            f"{folder}: no metrics.jsonl with a step in it; give the --save folder of a run"
        )
    analysis = folder / "analysis" / RESULT
    steps = checkpoint_folder.saved_steps(folder)
    latest = checkpoint_folder.step_folder(folder, steps[-1]) if steps else None
    return Run(
        "/".join(folder.resolve().parts[-2:]),
        metrics,
        read_rows(folder / "validation.jsonl"),
        checkpoint_folder.read_record(latest).settings if latest else {},
        steps,
        read_object(analysis) if analysis.is_file() else None,
        read_rows(folder / "starts.jsonl"),
        list(read_events(folder / EVENTS)),
    )


def thinned(
    rows: Sequence[Row], name: str, inner: str | None = None, points: int = POINTS
) -> tuple[list, list]:
    """Return (tokens, values) of a curve: at most ``points`` means over neighbouring steps."""
    pairs = [
        (row["tokens"], row[name] if inner is None else row[name][inner])
        for row in rows
        if name in row and (inner is None or inner in row[name])
    ]
    pairs = [pair for pair in pairs if math.isfinite(pair[1])]
    parts = np.array_split(np.array(pairs, dtype=np.float64), min(len(pairs), points) or 1)
    if not pairs:
        return [], []
    return [float(part[-1, 0]) for part in parts], [float(part[:, 1].mean()) for part in parts]
