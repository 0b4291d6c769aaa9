"""Picture of loss and expert load of a run over tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from moetron.common import json_files
from moetron.common.errors import UserError

Rows = Sequence[dict[str, Any]]


def draw(run: Path, output: Path) -> None:
    """Draw ``run/metrics.jsonl`` and ``run/validation.jsonl`` to ``output`` (PNG, SVG or PDF).

    Left: training and validation loss, nats per token. Right: for each MoE layer, the load of the
    fullest expert over the mean load (1 is perfect balance).

    Raises:
        UserError: ``run`` has no metrics.
    """
    metrics = read_rows(run / "metrics.jsonl")
    if not metrics:
        raise UserError(
            f"{run}: no metrics.jsonl with a step in it; give the --save folder of a run"
        )
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    _loss(left, metrics, read_rows(run / "validation.jsonl"))
    _expert_load(right, metrics)
    for axes in (left, right):
        axes.set_xlabel("tokens trained on")
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(output, dpi=150)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON Lines file, none if it does not exist."""
    if not path.is_file():
        return []
    return json_files.read_rows(path)


def _loss(axes: Axes, metrics: Rows, validation: Rows) -> None:
    axes.plot(
        [row["tokens"] for row in metrics],
        [row["lm_loss"] for row in metrics],
        linewidth=0.8,
        alpha=0.7,
        label="training",
    )
    if validation:
        axes.plot(
            [row["tokens"] for row in validation],
            [row["validation_loss"] for row in validation],
            "o-",
            markersize=4,
            label="validation",
        )
    axes.set_ylabel("loss, nats per token")
    axes.set_title("Loss")
    axes.legend(frameon=False)


def _expert_load(axes: Axes, metrics: Rows) -> None:
    rows = [row for row in metrics if "expert_load" in row]
    for layer in rows[-1]["expert_load"] if rows else ():
        axes.plot(
            [row["tokens"] for row in rows],
            [row["expert_load"][layer] for row in rows],
            linewidth=0.8,
            label=layer.replace("_", " "),
        )
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_ylabel("fullest expert / mean")
    axes.set_title("Expert load")
    if rows:
        axes.legend(frameon=False)
