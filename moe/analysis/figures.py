"""Pictures of the analyses, after the papers that introduced them."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from moetron.common.files import write_text
from moetron.moe.analysis.routing_study import Result
from moetron.moe.analysis.specialization import token_class_entropy

RESULT = "analysis.json"
SHOWN_EXPERTS = 32
"""Experts in the co-activation picture: those of the strongest pairs, as in OLMoE."""


def write(result: Result, output: Path) -> list[Path]:
    """Write ``result`` as JSON and one PNG per analysis of a decoder in it; return all paths."""
    output.mkdir(parents=True, exist_ok=True)
    paths = [output / RESULT]
    write_text(paths[0], json.dumps(result) + "\n")
    pictures = _PICTURES if "layers" in result else {}  # not of an encoder-decoder's stacks
    for name, draw in pictures.items():
        figure = draw(result)
        if figure is not None:
            paths.append(output / f"{name}.png")
            figure.savefig(paths[-1], dpi=120)
    return paths


def _saturation(result: Result) -> Figure | None:
    """Draw router saturation, as OLMoE, section 5.1."""
    rows = result.get("checkpoints") or []
    if len(rows) < 2:
        return None
    figure, (left, right) = _columns(2, height=3.6)
    for axes, top in ((left, "1"), (right, "k")):
        steps = [row["step"] for row in rows]
        for place, layer in enumerate(result["layers"]):
            shares = [100 * row["saturation"][top][place] for row in rows]
            axes.plot(steps, shares, "o-", markersize=3, label=f"layer {layer}")
        axes.axhline(100 * result["chance"][top], color="black", linestyle=":", label="chance")
        shown = "1" if top == "1" else str(result["topk"])
        axes.set(title=f"Router saturation, top {shown}", xlabel="step", ylim=(0, 102))
        axes.set_ylabel("% of final experts")
    right.legend(frameon=False, fontsize=8)
    return figure


def _coactivation(result: Result) -> Figure:
    """Draw co-activation of the strongest pairs, as OLMoE, section 5.2."""
    matrices = np.array(result["coactivation"])
    figure, all_axes = _columns(len(matrices), height=3.4)
    for axes, layer, matrix in zip(all_axes, result["layers"], matrices, strict=True):
        strongest = np.argsort(-matrix.max(1), kind="stable")[:SHOWN_EXPERTS]
        shown = np.sort(strongest)
        image = axes.imshow(100 * matrix[np.ix_(shown, shown)], cmap="magma", vmin=0)
        axes.set(title=f"Co-activation, layer {layer}", xlabel="expert j", ylabel="expert i")
        axes.set_xticks(range(0, len(shown), 8), shown[::8])
        axes.set_yticks(range(0, len(shown), 8), shown[::8])
        figure.colorbar(image, ax=axes, shrink=0.8, label="% of tokens of i also routed to j")
    return figure


def _domains(result: Result) -> Figure:
    """Draw one row per domain, white at chance, as OLMoE, section 5.3."""
    shares = 100 * np.array(result["domain_specialization"]["k"])  # [L, C, E]
    chance = 100 * result["chance"]["k"]
    figure, all_axes = _columns(len(shares), height=max(3.2, 1.2 + 0.22 * len(result["domains"])))
    colours = TwoSlopeNorm(chance, vmin=0, vmax=max(float(shares.max()), 1.01 * chance))
    for axes, layer, shares_CE in zip(all_axes, result["layers"], shares, strict=True):
        image = axes.imshow(shares_CE, aspect="auto", cmap="RdBu_r", norm=colours)
        axes.set(title=f"Routing of texts, layer {layer}", xlabel="expert")
        axes.set_yticks([])
    all_axes[0].set_yticks(range(len(result["domains"])), result["domains"], fontsize=8)
    all_axes[0].set_ylabel("text")
    label = f"% of tokens; white: chance, {chance:.3g}"
    figure.colorbar(image, ax=list(all_axes), label=label, pad=0.01)
    return figure


def _vocabulary(result: Result) -> Figure:
    """Draw OLMoE's section 5.4, and OpenMoE's comparison of token ids with positions."""
    figure, (left, right) = _columns(2, height=3.4)
    _lines(left, result["layers"], result["vocabulary_specialization"])
    left.set(title="Vocabulary specialisation", xlabel="layer", ylim=(0, 1))
    left.set_ylabel("share of an id's first expert")
    _lines(right, result["layers"], result["spread"])
    right.set(title="Context-independent specialisation", xlabel="layer")
    right.set_ylabel("standard deviation over experts")
    return figure


def _entropy(result: Result) -> Figure:
    """Draw the entropies of ST-MoE's Table 14, by domain and by token class."""
    figure, (left, right) = _columns(2, height=3.4)
    by_domain = np.array(result["domain_entropy"]).T
    _lines(left, result["layers"], dict(zip(result["domains"], by_domain, strict=True)))
    left.set(title="Routing entropy of a text's choices", xlabel="layer", ylabel="nats")
    _lines(right, result["layers"], token_class_entropy(result))
    right.set(title="Routing entropy of a class's first choices", xlabel="layer", ylabel="nats")
    for axes in (left, right):
        axes.axhline(result["chance"]["entropy"], color="black", linestyle=":", label="uniform")
        axes.legend(frameon=False, fontsize=7)
    return figure


def _drops(result: Result) -> Figure | None:
    """Draw drops by position, as OpenMoE."""
    fractions = 100 * np.array(result["dropped_by_position"])
    if not fractions.any():
        return None
    figure, (axes,) = _columns(1, height=3.4)
    places = (np.arange(fractions.shape[1]) + 0.5) / fractions.shape[1] * result["seq_length"]
    for layer, row in zip(result["layers"], fractions, strict=True):
        axes.plot(places, row, "o-", markersize=3, label=f"layer {layer}")
    axes.set(title="Dropped choices by position", xlabel="position", ylabel="% of choices dropped")
    axes.legend(frameon=False, fontsize=8)
    return figure


def _load(result: Result) -> Figure:
    """Draw the load of each expert at each checkpoint over the mean load."""
    rows = result.get("checkpoints") or [{"step": result.get("step", 0), "load": result["load"]}]
    loads = np.array([row["load"] for row in rows])  # [checkpoints, L, E]
    figure, all_axes = _columns(loads.shape[1], height=3.4)
    for place, (axes, layer) in enumerate(zip(all_axes, result["layers"], strict=True)):
        image = axes.imshow(
            loads[:, place].T, aspect="auto", cmap="coolwarm", vmin=0, vmax=2, origin="lower"
        )
        axes.set(title=f"Expert load, layer {layer}", xlabel="step", ylabel="expert")
        axes.set_xticks(range(len(rows)), [row["step"] for row in rows], rotation=60, fontsize=7)
        figure.colorbar(image, ax=axes, shrink=0.8, extend="max", label="load / mean")
    return figure


def _similarity(result: Result) -> Figure:
    """Draw the mean cosine of router rows and of expert weights, by layer."""
    figure, (axes,) = _columns(1, height=3.4)
    _lines(axes, result["layers"], result["similarity"])
    axes.set(title="Mean cosine between experts", xlabel="layer", ylabel="cosine")
    return figure


def _columns(count: int, height: float) -> tuple[Figure, Sequence[Axes]]:
    """Return a figure with a row of axes without top and right frames."""
    figure = Figure(figsize=(max(5.0, 4.2 * count), height), layout="constrained")
    row = figure.subplots(1, count, squeeze=False)[0]
    for axes in row:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, row


def _lines(
    axes: Axes, layers: Sequence[int], series: Mapping[str, Sequence[float] | np.ndarray]
) -> None:
    for name, values in series.items():
        axes.plot(layers, values, "o-", markersize=4, label=name)
    axes.set_xticks(layers)
    axes.legend(frameon=False, fontsize=8)


_PICTURES: dict[str, Callable[[Result], Figure | None]] = {
    "saturation": _saturation,
    "coactivation": _coactivation,
    "domains": _domains,
    "vocabulary": _vocabulary,
    "entropy": _entropy,
    "drops": _drops,
    "load": _load,
    "similarity": _similarity,
}
