"""Charts over tokens: losses, learning rate, speed, memory, balance, drops, stages."""

import html
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from moetron.moe.analysis.page.runs import Row, Run, thinned

TITLE_WIDTH = 42
"""Characters per title line, to fit on a phone."""
SHOWN_EVENTS = 50
EVENT_COLOURS = {
    "warn": "rgba(154,103,0,0.35)",
    "skip": "rgba(180,35,24,0.35)",
    "rollback": "rgba(180,35,24,0.18)",
    "stop": "rgba(180,35,24,0.6)",
}
STAGE_COLOURS = ("rgba(31,119,180,0.10)", "rgba(255,127,14,0.12)", "rgba(44,160,44,0.12)")


def over_tokens(runs: Sequence[Run]) -> list[go.Figure]:
    """Return every chart that has data, with all runs in each chart."""
    candidates = [
        losses(runs),
        *(by_source(run) for run in runs),
        curve(runs, "lr", "Learning rate", "learning rate"),
        from_zero(curve(runs, "tokens_per_s", "Throughput", "tokens/s, all ranks")),
        from_zero(curve(runs, "mfu", "Model FLOPs utilisation (MFU)", "% of the peak", 100)),
        from_zero(curve(runs, "peak_memory_bytes", "Peak memory, largest rank", "GiB", 2**-30)),
        _with_events(curve(runs, "grad_norm", "Gradient norm before clipping", "L2 norm"), runs),
        curve(runs, "loss_deviations", "Loss against the steps before it", "deviations"),
        curve(runs, "router_entropy", "Entropy of choices, lowest layer", "0 collapsed, 1 uniform"),
        curve(runs, "expert_bias_range", "Range of expert biases, widest layer", "range"),
        curve(runs, "aux_loss", "Balance loss, 1 is uniform", "balance loss"),
        curve(runs, "z_loss", "Router z-loss", "mean (log Z)²"),
        *(heat(run, "expert_load", "Load of the fullest expert", "× mean", 1.0) for run in runs),
        *(heat(run, "dropped_fractions", "Dropped choices", "share", 0.0) for run in runs),
    ]
    return [figure for figure in candidates if figure is not None]


def losses(runs: Sequence[Run]) -> go.Figure:
    """Return the chart of training and validation loss, with stages as bands."""
    figure = framed("Loss", "nats per token")
    for number, run in enumerate(runs):
        colour = _COLOURS[number % len(_COLOURS)]
        tokens, values = thinned(run.metrics, "lm_loss")
        line = {"color": colour, "width": 1}
        figure.add_scatter(x=tokens, y=values, name=f"{run.name} training", line=line, opacity=0.6)
        tokens, values = thinned(run.validation, "validation_loss")
        if values:
            name = f"{run.name} validation"
            figure.add_scatter(
                x=tokens, y=values, name=name, mode="lines+markers", line={"color": colour}
            )
    if len(runs) == 1:
        _bands(figure, runs[0])
    return _with_events(figure, runs) or figure


def by_source(run: Run) -> go.Figure | None:
    """Return the chart of validation loss by source, or None."""
    sources = sorted({name for row in run.validation for name in row.get("source_losses", {})})
    if not sources:
        return None
    figure = framed(f"Validation loss by source, {run.name}", "nats per token")
    for source in sources:
        tokens, values = thinned(run.validation, "source_losses", source)
        figure.add_scatter(x=tokens, y=values, name=source, mode="lines+markers")
    figure.update_layout(height=340 + 9 * len(sources))  # the legend is below, in columns
    return figure


def curve(
    runs: Sequence[Run], name: str, title: str, unit: str, scale: float = 1.0
) -> go.Figure | None:
    """Return the chart of a metric times ``scale``, or None if no run has it."""
    figure = framed(title, unit)
    for run in runs:
        tokens, values = thinned(run.metrics, name)
        if values:
            shown = [scale * value for value in values]
            figure.add_scatter(x=tokens, y=shown, name=run.name, line={"width": 1.2})
    return figure if figure.data else None


def from_zero(figure: go.Figure | None) -> go.Figure | None:
    """Start the y axis at zero, so that noise is not magnified."""
    return None if figure is None else figure.update_yaxes(rangemode="tozero")


def heat(run: Run, name: str, title: str, unit: str, floor: float) -> go.Figure | None:
    """Return the heat map of a per-layer metric, layers x tokens, or None."""
    layers = run.layers(name)
    if not layers:
        return None
    columns = [thinned(run.metrics, name, layer) for layer in layers]
    values = np.array([column[1] for column in columns])
    figure = framed(f"{title}, {run.name}", "layer")
    figure.add_heatmap(
        x=columns[0][0],
        y=[layer.removeprefix("layer_") for layer in layers],
        z=values,
        zmin=floor,
        zmax=max(floor + 1e-3, float(np.quantile(values, 0.98))),
        colorscale="Viridis",
        colorbar=bar(unit),
    )
    figure.update_yaxes(type="category")
    return figure


def bar(title: str, **options: Any) -> dict[str, Any]:
    """Return a colour bar with a title."""
    return {"title": {"text": title, "side": "right"}, "thickness": 14, **options}


def framed(title: str, y_title: str, x_title: str = "tokens") -> go.Figure:
    """Return an empty chart in the style of the page."""
    figure = go.Figure()
    lines = [html.escape(line, quote=False) for line in textwrap.wrap(title, TITLE_WIDTH)]
    figure.update_layout(
        template="plotly_white",
        title={"text": "<br>".join(lines), "font": {"size": 15}},
        margin={"l": 50, "r": 12, "t": 28 + 18 * len(lines), "b": 44},
        height=340,
        legend={"orientation": "h", "y": -0.22, "font": {"size": 11}},
        xaxis={"title": x_title, "automargin": True},
        yaxis={"title": y_title, "automargin": True},
    )
    return figure


def _with_events(figure: go.Figure | None, runs: Sequence[Run]) -> go.Figure | None:
    """Draw what the health checks of a single run found as bands over the tokens concerned."""
    if figure is None or len(runs) > 1:
        return figure
    for event in runs[0].events[:SHOWN_EVENTS]:
        first, last = event_tokens(runs[0], event)
        figure.add_vrect(
            x0=first,
            x1=last,
            fillcolor=EVENT_COLOURS.get(event["action"], EVENT_COLOURS["warn"]),
            line_width=1,
            line_color=EVENT_COLOURS.get(event["action"], EVENT_COLOURS["warn"]),
            annotation_text=html.escape(event["kind"].replace("_", " "), quote=False),
            annotation_position="bottom left",
            annotation_font_size=9,
        )
    return figure


def event_tokens(run: Run, event: Row) -> tuple[int, int]:
    """Return the tokens [first, last) that an event concerns: its step's, or those rolled back."""
    last, tokens = run.metrics[-1], {row["step"]: int(row["tokens"]) for row in run.metrics}
    if "rolled_back_to" in event:
        return tokens.get(event["rolled_back_to"], 0), int(event["next_token"])
    if event["samples"]:
        length = last["tokens"] // last["samples"]
        return event["samples"][0] * length, event["samples"][1] * length
    end = int(last["tokens"])
    before = 0 if event["step"] <= 1 else tokens.get(event["step"] - 1, end)
    return before, tokens.get(event["step"], end)


def _bands(figure: go.Figure, run: Run) -> None:
    """Draw stages and their objectives behind the curves."""
    stages = run.stages
    for number, stage in enumerate(stages if len(stages) > 1 else ()):
        figure.add_vrect(
            x0=stage.first_token,
            x1=stage.last_token,
            fillcolor=STAGE_COLOURS[number % len(STAGE_COLOURS)],
            line_width=0,
            annotation_text=f"stage {number + 1}: {stage.objective}",
            annotation_position="top left",
        )


_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf")
