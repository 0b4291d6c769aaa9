"""Table and picture of a sweep."""

import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from moetron.common.files import write_text
from moetron.moe.analysis.ablation.outcome import Outcome, outcome
from moetron.moe.analysis.ablation.sweep import Sweep
from moetron.moe.plan.parameters import count_parameters

TABLE, PICTURE = "table.md", "table.png"
_SMOOTHING = 0.02
Outcomes = dict[str, list[Outcome]]
"""Variant -> ended runs."""


def outcomes(sweep: Sweep, output: Path) -> Outcomes:
    """Return the outcomes of the ended runs below ``output``."""
    return {
        variant: [found for run in sweep.of(variant) if (found := outcome(run, output))]
        for variant in sweep.variants
    }


def write(sweep: Sweep, output: Path) -> str:
    """Write ``table.md`` and ``table.png`` of the ended runs; return the table."""
    found = outcomes(sweep, output)
    text = markdown(sweep, found)
    write_text(output / TABLE, text)
    draw(found).savefig(output / PICTURE, dpi=150)
    return text


def markdown(sweep: Sweep, found: Outcomes) -> str:
    """Return a Markdown table with one row per variant.

    Losses are means over stable runs ± standard deviation over seeds. Differences are to the
    baseline run of the same seed, which has the same data.
    """
    baseline, *_ = sweep.variants
    validated = any(run.validated for runs in found.values() for run in runs)
    head = [
        "variant",
        "parameters",
        "active",
        "stable",
        f"{'validation' if validated else 'training'} loss",
        f"against {baseline}",
        "tokens/s",
    ]
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for variant in sweep.variants:
        rows.append(_row(sweep, variant, found[variant], found[baseline]))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _row(sweep: Sweep, variant: str, found: list[Outcome], baseline: list[Outcome]) -> list[str]:
    runs = sweep.of(variant)
    count = count_parameters(runs[0].settings, runs[0].settings.model.vocab_size or 1)
    stable = [run for run in found if run.stable]
    before = {run.run.seed: run.loss for run in baseline if run.stable}
    differences = [run.loss - before[run.run.seed] for run in stable if run.run.seed in before]
    pending = f" ({len(runs) - len(found)} to run)" if len(found) < len(runs) else ""
    return [
        variant,
        f"{count.main - count.embedding:,}",
        f"{count.active - count.embedding:,}",
        f"{len(stable)}/{len(found)}{pending}",
        _spread([run.loss for run in stable]),
        "" if variant == sweep.variants[0] else _spread(differences, sign="+"),
        f"{statistics.mean(run.tokens_per_s for run in found):,.0f}" if found else "",
    ]


def _spread(values: Sequence[float], sign: str = "") -> str:
    """Format the mean and, for several values, the standard deviation."""
    if not values:
        return ""
    text = f"{statistics.mean(values):{sign}.4f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.4f}"


def draw(found: Outcomes) -> Figure:
    """Draw the final loss of every run by variant (left) and smoothed training loss (right).

    Unstable runs are hollow dots; non-finite ones are left out.
    """
    figure = Figure(figsize=(10, max(3.0, 1.2 + 0.28 * len(found))), layout="constrained")
    left, right = figure.subplots(1, 2)
    for place, (variant, runs) in enumerate(found.items()):
        colour = f"C{place % 10}"
        style = ("-", "--", ":")[place // 10 % 3]
        for run in runs:
            fill = colour if run.stable else "none"
            left.plot(run.loss, place, "o", color=colour, markerfacecolor=fill)
        stable = [run for run in runs if run.stable]
        losses = [run.losses for run in stable]
        if stable:
            width = max(1, round(_SMOOTHING * len(losses[0])))
            curve = np.convolve(np.mean(losses, axis=0), np.ones(width) / width, mode="valid")
            right.plot(stable[0].tokens[width - 1 :], curve, style, color=colour, label=variant)
    left.set_yticks(range(len(found)), found)
    left.invert_yaxis()
    left.set(xlabel="final loss, nats per token", ylabel="variant", title="Each seed")
    right.set(
        xlabel="tokens trained on",
        ylabel="training loss, nats per token",
        title="Mean of stable seeds",
    )
    right.xaxis.set_major_formatter(EngFormatter())
    right.legend(frameon=False, fontsize=7)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
