"""Differences between data stages: sources, objective, drops along the sequence."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from moetron.moe.analysis.page.answers import Answer
from moetron.moe.analysis.page.charts import framed
from moetron.moe.analysis.page.runs import Row, Run, thinned

SHARES = 60
"""Points of a curve of shares; single steps have too few samples."""


def of_stages(runs: Sequence[Run]) -> list[go.Figure]:
    """Return charts of the runs that have several sources or drop tokens."""
    figures = [figure for run in runs for figure in (_sources(run), _drops(run))]
    return [figure for figure in figures if figure is not None]


def answers(run: Run) -> list[Answer]:
    """Answer for each stage, if there are several, its sources and drops."""
    found = []
    for number, stage in enumerate(run.stages if len(run.stages) > 1 else (), start=1):
        rows = [row for row in run.metrics if row.get("stage") == number]
        if shares := _shares(rows):
            parts = ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares.items())
            question = f"What does stage {number} train on?"
            rule = "objective; each source's share of the tokens with loss"
            found.append(Answer(question, "finding", f"{stage.objective}; {parts}", rule))
        fractions = _dropped_at(rows)
        if fractions.size:
            text = (
                f"{100 * fractions[0]:.1f} % of choices in the first part of a sequence, "
                f"{100 * fractions[-1]:.1f} % in the last of {len(fractions)}"
            )
            rule = "mean over layers, second half of the stage, in training"
            found.append(Answer(f"Where does stage {number} drop tokens?", "finding", text, rule))
    return found


def _shares(rows: Sequence[Row]) -> dict[str, float]:
    """Return each source's share of the tokens with loss, or nothing for a single source."""
    names = sorted({name for row in rows for name in row.get("source_tokens", {})})
    counts = [sum(row["source_tokens"].get(name, 0) for row in rows) for name in names]
    return {name: count / sum(counts) for name, count in zip(names, counts, strict=True)}


def _dropped_at(rows: Sequence[Row]) -> np.ndarray:
    """Return the share of dropped choices by part of the sequence, [16], in the later half."""
    late = [
        row["dropped_by_position"]
        for row in rows[len(rows) // 2 :]
        if row.get("dropped_by_position")
    ]
    return np.mean([list(row.values()) for row in late], axis=(0, 1)) if late else np.zeros(0)


def _sources(run: Run) -> go.Figure | None:
    """Return the stacked chart of source shares over the run, or None."""
    rows = [{"tokens": row["tokens"], **_shares([row])} for row in run.metrics]
    names = sorted({name for row in rows for name in row if name != "tokens"})
    if not names:
        return None
    figure = framed(f"Tokens by source, {run.name}", "share of tokens with loss")
    for name in names:
        tokens, values = thinned([{name: 0.0, **row} for row in rows], name, points=SHARES)
        figure.add_scatter(x=tokens, y=values, name=name, stackgroup="all", line={"width": 0.5})
    figure.update_yaxes(range=[0, 1], tickformat=".0%")
    for stage in run.stages[1:]:
        figure.add_vline(stage.first_token, line_dash="dash", annotation_text=stage.objective)
    figure.update_layout(height=340 + 9 * len(names))  # the legend is below, in columns
    return figure


def _drops(run: Run) -> go.Figure | None:
    """Return the chart of drops along the sequence, one curve per stage, or None."""
    length = run.settings.get("model", {}).get("seq_length")
    figure = framed(
        f"Dropped choices by position in training, {run.name}", "share dropped", "position"
    )
    for number, stage in enumerate(run.stages, start=1):
        rows = [row for row in run.metrics if row.get("stage", 1) == number]
        fractions = _dropped_at(rows)
        places = (np.arange(len(fractions)) + 0.5) / max(len(fractions), 1) * (length or 1)
        if fractions.any():
            name = f"stage {number}: {stage.objective}"
            figure.add_scatter(x=places, y=fractions, name=name, mode="lines+markers")
    return figure if figure.data else None
