"""The charts of what tools/analyze_routing.py found."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from moetron.moe.analysis.page.charts import framed
from moetron.moe.analysis.specialization import token_class_entropy


def of_routing(analysis: dict[str, Any]) -> list[go.Figure]:
    """Every chart that an analysis has something for; the section that holds them names the run."""
    layers = [f"layer {layer}" for layer in analysis["layers"]]
    figures = []
    if len(analysis.get("checkpoints") or ()) > 1:
        figures += [_saturation(analysis, layers, top) for top in ("k", "1")]
        figures += [_load(analysis, place) for place in range(len(layers))]
    figures += [_domains(analysis, place) for place in range(len(layers))]
    figures += [_coactivation(analysis, place) for place in range(len(layers))]
    figures.append(
        _by_layer("Vocabulary specialisation", layers, analysis["vocabulary_specialization"])
    )
    entropy = dict(zip(analysis["domains"], np.array(analysis["domain_entropy"]).T, strict=True))
    figures.append(_by_layer("Routing entropy, nats", layers, entropy))
    if entropy := token_class_entropy(analysis):
        figures.append(_by_layer("Entropy of token classes' first choices, nats", layers, entropy))
    figures.append(_by_layer("Mean cosine between experts", layers, analysis["similarity"]))
    if np.any(analysis["dropped_by_position"]):
        figures.append(_drops(analysis, layers))
    return figures


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
    title = f"Load of every expert, layer {analysis['layers'][place]}; 1 is an even share"
    figure = framed(title, "expert", "step")
    loads_EC = np.array([row["load"][place] for row in rows]).T
    steps = [str(row["step"]) for row in rows]
    figure.add_heatmap(x=steps, z=loads_EC, zmin=0, zmax=2, colorscale="RdBu_r")
    figure.update_xaxes(type="category")
    return figure


def _domains(analysis: dict[str, Any], place: int) -> go.Figure:
    title = f"Share of a text's tokens that visit an expert, layer {analysis['layers'][place]}"
    figure = framed(f"{title}", "", "expert")
    shares_CE = np.array(analysis["domain_specialization"]["k"])[place]
    middle = analysis["chance"]["k"]
    figure.add_heatmap(y=analysis["domains"], z=shares_CE, zmin=0, zmid=middle, colorscale="RdBu_r")
    figure.update_layout(height=max(260, 120 + 22 * len(shares_CE)))
    return figure


def _coactivation(analysis: dict[str, Any], place: int) -> go.Figure:
    title = f"Co-activation, layer {analysis['layers'][place]}"
    figure = framed(title, "expert i", "expert j")
    figure.add_heatmap(z=np.array(analysis["coactivation"][place]), zmin=0, colorscale="Magma")
    return figure


def _drops(analysis: dict[str, Any], layers: list[str]) -> go.Figure:
    figure = framed("Dropped choices by position", "share dropped", "position")
    for layer, row in zip(layers, analysis["dropped_by_position"], strict=True):
        places = (np.arange(len(row)) + 0.5) / len(row) * analysis["seq_length"]
        figure.add_scatter(x=places, y=row, name=layer, mode="lines+markers")
    return figure


def _by_layer(
    title: str, layers: list[str], series: Mapping[str, Sequence[float] | np.ndarray]
) -> go.Figure:
    figure = framed(title, "", "")
    for name, values in series.items():
        figure.add_scatter(x=layers, y=list(values), name=name, mode="lines+markers")
    return figure
