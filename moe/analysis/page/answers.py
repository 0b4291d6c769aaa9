"""Questions about a run, answered in words with the value and rule behind each answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from moetron.moe.analysis.page.runs import Run

Grade = Literal["good", "watch", "bad", "finding", "unknown"]
SPIKE_WINDOW = 50
SPIKE_DEVIATIONS = 6.0
SPIKE_LEAST = 0.3  # nats
FROZEN = 0.8
"""Routing is frozen when this share of a token's final experts is chosen."""


@dataclass(frozen=True)
class Answer:
    """One line of the page: question, grade, answer and its rule."""

    question: str
    grade: Grade
    text: str
    rule: str


def spikes(run: Run) -> list[int]:
    """Return the steps whose loss spikes above the ``SPIKE_WINDOW`` steps before them."""
    losses = np.array([row["lm_loss"] for row in run.metrics])
    found = []
    for place in range(SPIKE_WINDOW, len(losses)):
        before = losses[place - SPIKE_WINDOW : place]
        rise = losses[place] - before.mean()
        if rise > max(SPIKE_DEVIATIONS * before.std(), SPIKE_LEAST):
            found.append(int(run.metrics[place]["step"]))
    return found


def health(run: Run) -> list[Answer]:
    """Answer whether the run is healthy."""
    return [_loss(run), _spikes(run), _found(run), _load(run), _drops(run)]


def routing(run: Run) -> list[Answer]:
    """Answer when routing froze, which experts specialise and where tokens are dropped."""
    if run.analysis is None:
        text = "run tools/analyze_routing.py on this run, then repeat this report"
        return [
            Answer("How does the model route?", "unknown", text, "needs analysis/analysis.json")
        ]
    answers = [_frozen(run)] if len(run.analysis.get("checkpoints") or ()) > 1 else []
    return [*answers, *_specialists(run), _dropped_where(run)]


def _loss(run: Run) -> Answer:
    losses = np.array([row["lm_loss"] for row in run.metrics])
    share = max(1, len(losses) // 10)
    first, last = losses[:share].mean(), losses[-share:].mean()
    text = f"from {first:.3f} to {last:.3f} nats per token"
    if run.validation:
        text += f"; validation {run.validation[-1]['validation_loss']:.3f}"
    grade: Grade = "good" if last < first else "bad"
    return Answer(
        "Is the loss falling?", grade, text, "mean of the last tenth below that of the first"
    )


def _spikes(run: Run) -> Answer:
    found = spikes(run)
    where = f": steps {', '.join(map(str, found[:8]))}" if found else ""
    grade: Grade = "good" if not found else "watch" if len(found) < 5 else "bad"
    rule = f"a step {SPIKE_DEVIATIONS:.0f} deviations and {SPIKE_LEAST} nats above the 50 before it"
    return Answer("Does it spike?", grade, f"{len(found)} spikes{where}", rule)


def _found(run: Run) -> Answer:
    """Answer from the events of the run's own health checks."""
    kinds = [row["kind"].replace("_", " ") for row in run.events]
    text = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds)) or "nothing"
    hard = [row for row in run.events if row["action"] in ("stop", "rollback")]
    grade: Grade = "good" if not kinds else "bad" if hard else "watch"
    rule = (
        "events.jsonl: spikes, values that are not finite, replicas that differ, sick experts, "
        "slow or hanging ranks"
    )
    return Answer("What did the health checks find?", grade, text, rule)


def _load(run: Run) -> Answer:
    question, rule = "Are experts balanced?", "fullest expert over the mean: below 2 good, 4 bad"
    layers = run.layers("expert_load")
    if not layers:
        return Answer(question, "unknown", "a dense model", rule)
    rows = [row["expert_load"] for row in run.metrics if "expert_load" in row]
    recent = rows[-max(1, len(rows) // 10) :]
    means = {layer: float(np.mean([row[layer] for row in recent])) for layer in layers}
    worst = max(means, key=lambda layer: means[layer])
    grade: Grade = "good" if means[worst] < 2 else "watch" if means[worst] < 4 else "bad"
    text = f"fullest expert {means[worst]:.2f} x the mean, in {worst.replace('_', ' ')}"
    return Answer(question, grade, f"{text}, over the last tenth", rule)


def _drops(run: Run) -> Answer:
    question, rule = "Are tokens dropped?", "choices without a slot: below 1 % good, 10 % bad"
    dropped = run.tail("dropped_fraction")
    if not dropped.size:
        return Answer(question, "good", "none: no capacity limit", rule)
    mean = float(dropped.mean())
    grade: Grade = "good" if mean < 0.01 else "watch" if mean < 0.1 else "bad"
    return Answer(question, grade, f"{100 * mean:.2f} % over the last tenth", rule)


def _frozen(run: Run) -> Answer:
    assert run.analysis is not None
    rows, last = run.analysis["checkpoints"], run.analysis["checkpoints"][-1]["step"]
    frozen = {
        row["step"]: float(np.mean(row["saturation"]["k"])) for row in rows if row["step"] < last
    }
    early = [step for step, share in frozen.items() if share >= FROZEN]
    first, share = next(iter(frozen.items()))
    text = f"{100 * share:.0f} % of the final experts are already chosen at step {first}; "
    text += f"{100 * FROZEN:.0f} % at step {early[0]} of {last}" if early else "not frozen yet"
    rule = f"mean over layers of top-k saturation; chance {100 * run.analysis['chance']['k']:.3g} %"
    return Answer("When did routing freeze?", "finding", text, rule)


def _text_groups(domains: Sequence[str]) -> dict[str, list[int]]:
    """Group texts by the first part of their names (``code`` of ``code.python``) if it varies."""
    first: dict[str, list[int]] = {}
    for number, domain in enumerate(domains):
        first.setdefault(domain.split(".")[0], []).append(number)
    return first if len(first) > 1 else {domain: [n] for n, domain in enumerate(domains)}


def _specialists(run: Run) -> list[Answer]:
    """Answer for each group of texts which experts it uses most compared with the others."""
    assert run.analysis is not None
    analysis, chance = run.analysis, run.analysis["chance"]["k"]
    shares_LCE = np.array(analysis["domain_specialization"]["k"])
    groups = _text_groups(analysis["domains"])
    shares = np.stack([shares_LCE[:, of].mean(1) for of in groups.values()], axis=1)  # [L, F, E]
    others = (shares.sum(1, keepdims=True) - shares) / max(shares.shape[1] - 1, 1)
    answers = []
    for number, group in enumerate(groups):
        lead = shares[:, number] - others[:, number]  # [L, E]
        best = np.argsort(-lead, axis=None, kind="stable")[:3]
        texts = []
        for place in best:
            layer, expert = np.unravel_index(place, lead.shape)
            here, there = shares[layer, number, expert], others[layer, number, expert]
            texts.append(
                f"expert {expert} in layer {analysis['layers'][layer]} "
                f"({100 * here:.0f} % of its tokens, {100 * there:.0f} % elsewhere)"
            )
        rule = f"largest lead over the mean of the other texts; chance {100 * chance:.3g} %"
        question = f"Which experts specialise in {group}?"
        answers.append(Answer(question, "finding", "; ".join(texts), rule))
    return answers


def _dropped_where(run: Run) -> Answer:
    assert run.analysis is not None
    fractions = np.array(run.analysis["dropped_by_position"])  # [L, buckets]
    question, rule = "Where are tokens dropped?", "dropped choices by position and layer"
    if not fractions.any():
        return Answer(question, "finding", "nowhere", rule)
    layer = run.analysis["layers"][int(fractions.mean(1).argmax())]
    ends = fractions.mean(0)
    text = (
        f"most in layer {layer}; {100 * ends[0]:.1f} % at the start of a sequence, "
        f"{100 * ends[-1]:.1f} % at its end"
    )
    return Answer(question, "finding", text, rule)
