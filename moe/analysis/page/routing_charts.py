"""Charts of the results of tools/analyze_routing.py."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from moetron.moe.analysis.page.charts import bar, framed
from moetron.moe.analysis.page.stack_answers import has_stacks
from moetron.moe.analysis.specialization import token_class_entropy


def of_routing(analysis: dict[str, Any]) -> list[go.Figure]:
    """Return every chart that an analysis has data for."""
    if has_stacks(analysis):
        return [_entropies(stack, found) for stack, found in analysis["stacks"].items()]
    layers = [f"layer {layer}" for layer in analysis["layers"]]
    places = range(len(layers))
    figures = []
    if len(analysis.get("checkpoints") or ()) > 1:
        figures += [_saturation(analysis, layers, top) for top in ("k", "1")]
        figures += [_load(analysis, place) for place in places]
    figures += [_domains(analysis, place) for place in places]
    figures += [_coactivation(analysis, place) for place in places]
    entropy = dict(zip(analysis["domains"], np.array(analysis["domain_entropy"]).T, strict=True))
    by_layer = {
        ("Vocabulary specialisation", "share of an id's first expert"): analysis[
            "vocabulary_specialization"
        ],
        ("Routing entropy of a text's choices", "nats"): entropy,
        ("Routing entropy of a token class's first choices", "nats"): token_class_entropy(analysis),
        ("Mean cosine between experts", "cosine"): analysis["similarity"],
    }
    figures += [
        _by_layer(title, unit, analysis["layers"], series)
        for (title, unit), series in by_layer.items()
        if series
    ]
    if np.any(analysis["dropped_by_position"]):
        figures.append(_drops(analysis, layers))
    return figures


def _entropies(stack: str, found: dict[str, Any]) -> go.Figure:
    series = {"all tokens": found["entropy"], **token_class_entropy(found)}
    return _by_layer(f"Routing entropy, {stack}", "nats", found["layers"], series)


def _saturation(analysis: dict[str, Any], layers: list[str], top: str) -> go.Figure:
    shown = str(analysis["topk"]) if top == "k" else "1"
    figure = framed(f"Router saturation, top {shown}", "share of final experts", "step")
    rows = analysis["checkpoints"]
    for place, layer in enumerate(layers):
        shares = [row["saturation"][top][place] for row in rows]
        steps = [row["step"] for row in rows]
        figure.add_scatter(x=steps, y=shares, name=layer, mode="lines+markers")
    figure.add_hline(y=analysis["chance"][top], line_dash="dot", annotation_text="chance")
    figure.update_yaxes(range=[0, 1.02])
    return figure


def _load(analysis: dict[str, Any], place: int) -> go.Figure:
    rows = analysis["checkpoints"]
    title = f"Load of every expert, layer {analysis['layers'][place]}"
    figure = framed(title, "expert", "step")
    loads_EC = np.array([row["load"][place] for row in rows]).T
    steps = [str(row["step"]) for row in rows]
    figure.add_heatmap(
        x=steps, z=loads_EC, zmin=0, zmax=2, colorscale="RdBu_r", colorbar=bar("× mean")
    )
    figure.update_xaxes(type="category")
    return figure


def _domains(analysis: dict[str, Any], place: int) -> go.Figure:
    title = f"Share of a text's tokens routed to an expert, layer {analysis['layers'][place]}"
    figure = framed(title, "text", "expert")
    shares_CE = 100 * np.array(analysis["domain_specialization"]["k"])[place]
    chance = 100 * analysis["chance"]["k"]
    top = max(float(shares_CE.max()), 1.01 * chance)
    figure.add_heatmap(
        y=analysis["domains"],
        z=shares_CE,
        zmin=0,
        zmax=top,
        colorscale=_white_at(chance / top),
        colorbar=bar(f"% of tokens, chance {chance:.3g}"),
    )
    figure.update_layout(height=max(300, 150 + 22 * len(shares_CE)))
    return figure


def _coactivation(analysis: dict[str, Any], place: int) -> go.Figure:
    title = f"Co-activation, layer {analysis['layers'][place]}"
    figure = framed(title, "expert i", "expert j")
    percent = 100 * np.array(analysis["coactivation"][place])
    scale = bar("% of tokens of i also routed to j")
    figure.add_heatmap(z=percent, zmin=0, colorscale="Magma", colorbar=scale)
    return figure


def _white_at(middle: float) -> list[tuple[float, str]]:
    """Return a scale from zero: blue below ``middle`` (0 to 1), white there, red above.

    Plotly's ``zmid`` would make the scale symmetric and start below zero.
    """
    positions = np.concatenate([np.linspace(0, middle, 6), np.linspace(middle, 1, 6)[1:]])
    colours = sample_colorscale("RdBu_r", np.linspace(0, 1, len(positions)).tolist())
    return list(zip(positions.tolist(), colours, strict=True))


def _drops(analysis: dict[str, Any], layers: list[str]) -> go.Figure:
    figure = framed("Dropped choices by position", "share dropped", "position")
    for layer, row in zip(layers, analysis["dropped_by_position"], strict=True):
        places = (np.arange(len(row)) + 0.5) / len(row) * analysis["seq_length"]
        figure.add_scatter(x=places, y=row, name=layer, mode="lines+markers")
    return figure


def _by_layer(
    title: str, unit: str, layers: Sequence[int], series: Mapping[str, Sequence[float] | np.ndarray]
) -> go.Figure:
    figure = framed(title, unit, "layer")
    figure.update_xaxes(type="category")
    for name, values in series.items():
        figure.add_scatter(x=layers, y=list(values), name=name, mode="lines+markers")
    return figure
