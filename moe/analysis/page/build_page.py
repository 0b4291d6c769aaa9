"""Assembly of the page: one HTML file with charts, styles and the plotting library."""

import html
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import yaml
from jinja2 import Environment, StrictUndefined
from plotly.offline import get_plotlyjs

from moetron import __version__
from moetron.common.files import write_text
from moetron.moe.analysis.page import answers, overview
from moetron.moe.analysis.page import stage_charts as stages
from moetron.moe.analysis.page.charts import over_tokens
from moetron.moe.analysis.page.routing_charts import of_routing
from moetron.moe.analysis.page.runs import Run
from moetron.moe.analysis.page.stack_answers import (
    entropies,
    has_stacks,
    sentinel_words,
    stack_routing,
)

SHOWN_EXPERTS = 16
"""Experts per layer whose token ids are listed."""


def write_page(runs: Sequence[Run], output: Path) -> None:
    """Write the page of one run or of several runs."""
    text = resources.files(__package__).joinpath("template.html").read_text(encoding="utf-8")
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(text)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, template.render(_content(runs)))


def _content(runs: Sequence[Run]) -> dict[str, Any]:
    analysed = [(run, run.analysis) for run in runs if run.analysis is not None]
    return {
        "title": " and ".join(run.name for run in runs),
        "version": __version__,
        "plotly_js": get_plotlyjs(),
        "runs": [run.name for run in runs],
        "glance": _side_by_side([overview.glance(run) for run in runs]),
        "setup": _side_by_side([overview.setup(run) for run in runs]),
        "answers": [
            section
            for run in runs
            for section in (
                {"title": f"Is {run.name} healthy?", "rows": answers.health(run)},
                {"title": f"How {run.name} routes", "rows": _routing(run)},
                {"title": f"How the stages of {run.name} differ", "rows": stages.answers(run)},
            )
            if section["rows"]
        ],
        "charts": [
            {
                "title": "Over the run",
                "figures": _html([*over_tokens(runs), *stages.of_stages(runs)]),
            },
            *(
                {"title": f"Routing of {run.name}", "figures": _html(of_routing(found))}
                for run, found in analysed
            ),
        ],
        "tables": [entropies(run.name, found) for run, found in analysed if has_stacks(found)],
        "words": [section for run, found in analysed for section in _words(run.name, found)],
        "events": [
            {"run": run.name, "step": step, "text": text}
            for run in runs
            for step, text in overview.events(run)
        ],
        "settings": [
            {"title": f"Settings of {run.name}", "yaml": yaml.safe_dump(run.settings)}
            for run in runs
            if run.settings
        ],
    }


def _side_by_side(tables: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Any]]]:
    """Return (name, value of each run or None) for the rows of all tables."""
    names = dict.fromkeys(name for table in tables for name in table)
    return [(name, [table.get(name) for table in tables]) for name in names]


def _routing(run: Run) -> list[answers.Answer]:
    return stack_routing(run) if has_stacks(run.analysis) else answers.routing(run)


def _words(name: str, analysis: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the most frequent token ids of each expert of the last layer (OLMoE, 5.4)."""
    if has_stacks(analysis):
        return sentinel_words(name, analysis)
    place = len(analysis["layers"]) - 1
    experts = analysis["top_ids"]["input"][place]
    shares = [sum(share for _, share in ids) for ids in experts]
    best = sorted(range(len(experts)), key=lambda expert: -shares[expert])[:SHOWN_EXPERTS]
    rows = [
        {
            "expert": expert,
            "ids": ", ".join(f"{text!r} {100 * share:.0f} %" for text, share in experts[expert]),
        }
        for expert in sorted(best)
    ]
    title = f"Words of the experts of layer {analysis['layers'][place]}, {name}"
    return [{"title": title, "rows": rows}]


def _html(figures: Sequence[go.Figure]) -> list[str]:
    """Return each chart as responsive HTML."""
    for figure in figures:
        _escape(figure)
    return [
        figure.to_html(
            full_html=False,
            include_plotlyjs=False,
            config={"responsive": True, "displayModeBar": False},
            default_width="100%",
        )
        for figure in figures
    ]


def _escape(figure: go.Figure) -> None:
    """Escape names of runs, sources, stages and texts, since Plotly interprets tags in them."""
    for trace in figure.data:
        if trace.name is not None:
            trace.name = html.escape(trace.name, quote=False)
        if trace.x is not None and any(isinstance(label, str) for label in trace.x):
            trace.x = [html.escape(str(label), quote=False) for label in trace.x]
        if trace.y is not None and any(isinstance(label, str) for label in trace.y):
            trace.y = [html.escape(str(label), quote=False) for label in trace.y]
    for note in figure.layout.annotations:
        note.text = html.escape(note.text or "", quote=False)
