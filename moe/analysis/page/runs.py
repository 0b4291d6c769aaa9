"""What a run left in its folder, read for the page."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moetron.common.errors import UserError
from moetron.moe.analysis.curves import read_rows
from moetron.moe.analysis.figures import RESULT
from moetron.moe.checkpoint import run_folder as checkpoint_folder

Row = dict[str, Any]
POINTS = 1_000
"""A curve has at most so many points; each is the mean of equally many steps."""


@dataclass(frozen=True)
class Stage:
    """A stage of the data, in tokens of the run."""

    first_token: int
    last_token: int
    objective: str


@dataclass(frozen=True)
class Run:
    """One run."""

    name: str
    """Its folder and the one above: ``quickstart/run``."""
    metrics: list[Row]
    """One row a step, as in metrics.jsonl."""
    validation: list[Row]
    settings: dict[str, dict[str, Any]]
    """Of its latest checkpoint; empty before the first."""
    checkpoints: list[int]
    """Steps."""
    analysis: Row | None
    """What tools/analyze_routing.py found."""
    starts: list[Row] = field(default_factory=list)
    """One row a start, as in starts.jsonl; empty for runs of older versions."""

    @property
    def stages(self) -> list[Stage]:
        """The stages of the data that the run reached; one where it has none."""
        data, end = self.settings.get("data", {}), self.metrics[-1]["tokens"]
        first, stages = 0, []
        for stage in data.get("stages") or [{"objective": data.get("objective", "causal")}]:
            last = min(stage.get("until_tokens") or end, end)
            if first < end:
                stages.append(Stage(first, last, stage["objective"]))
            first = last
        return stages

    def tail(self, name: str, share: float = 0.1) -> np.ndarray:
        """The values of ``name`` over the last ``share`` of the steps that have it; maybe empty."""
        values = [row[name] for row in self.metrics if name in row]
        return np.array(values[-max(1, round(len(values) * share)) :], dtype=np.float64)

    def layers(self, name: str) -> list[str]:
        """The keys of a figure that a row holds for each layer."""
        return next((list(row[name]) for row in self.metrics if name in row), [])


def read(folder: Path) -> Run:
    """Read a run's folder.

    Raises:
        UserError: there is no metrics.jsonl with a step in it.
    """
    metrics = read_rows(folder / "metrics.jsonl")
    if not metrics:
        raise UserError(f"{folder}: no metrics.jsonl with a step in it: name a run's --save folder")
    analysis = folder / "analysis" / RESULT
    steps = checkpoint_folder.saved_steps(folder)
    latest = checkpoint_folder.step_folder(folder, steps[-1]) if steps else None
    return Run(
        "/".join(folder.resolve().parts[-2:]),
        metrics,
        read_rows(folder / "validation.jsonl"),
        checkpoint_folder.read_record(latest).settings if latest else {},
        steps,
        json.loads(analysis.read_text(encoding="utf-8")) if analysis.is_file() else None,
        read_rows(folder / "starts.jsonl"),
    )


def thinned(
    rows: Sequence[Row], name: str, inner: str | None = None, points: int = POINTS
) -> tuple[list, list]:
    """(tokens, values) of a curve: at most ``points`` means over neighbouring steps."""
    pairs = [
        (row["tokens"], row[name] if inner is None else row[name][inner])
        for row in rows
        if name in row and (inner is None or inner in row[name])
    ]
    parts = np.array_split(np.array(pairs, dtype=np.float64), min(len(pairs), points) or 1)
    if not pairs:
        return [], []
    return [float(part[-1, 0]) for part in parts], [float(part[:, 1].mean()) for part in parts]
