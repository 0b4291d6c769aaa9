"""Rejected settings fail, hang or train another model: no rule is without reason.

The checks are between the command line and the settings; here the trainer is
built from settings that they reject. A draw that breaks one rule is evidence about this rule, one
that breaks several is not used.
"""

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from moetron.moe.config.checks import problems
from moetron.moe.verify.parity import Result, Tolerance, compare
from tests.parallel.support.parity_ranks import Run
from tests.parallel.support.random_layouts import Draw, draw
from tests.parallel.support.random_runs import TOLERANCE, Attempt, attempts, title

SEEDS, TIME_LIMIT_S = 2000, 60
CLEARLY = Tolerance(loss=1e-4, grad_norm=1e-2, gradient=1e-2)
"""Differences between this and TOLERANCE are neither the same nor another model."""


@dataclass(frozen=True)
class Works:
    """Reason for a rule that rejects settings which train as on one process."""

    reason: str
    instead: dict[str, Any] = field(default_factory=dict)
    """The rejected settings without the ignored one; a run on one process checks
    whether they train the same."""


_IGNORED = "does nothing here"
_TWO_WAYS = "specifies stages in two ways: one of them would be ignored"
_OWN_SCORES = "weights are not of these scores, a balance loss would be"
WORKS: dict[str, Works] = {
    r"--moe-router-topk-scaling-factor # is incompatible with --moe-router-type \w+": Works(
        _IGNORED, {"moe_router_topk_scaling_factor": None}
    ),
    "--moe-router-load-balancing-type sinkhorn does not support groups": Works(
        _IGNORED, {"moe_router_num_groups": None, "moe_router_group_topk": None}
    ),
    "--moe-router-type base gives each token one expert": Works(_IGNORED, {"moe_router_topk": 1}),
    "--moe-router-type hash needs --moe-router-score-function softmax": Works(
        _IGNORED, {"moe_router_score_function": "softmax"}
    ),
    r"--moe-router-type \w+ needs --moe-router-score-function softmax": Works(_OWN_SCORES),
    r"--moe-router-type (hash|reinforce) routes only the main model's tokens": Works(
        "modules that predict further tokens would route by another token's id or reward"
    ),
    "--moe-router-topk # must be a multiple of --moe-router-group-topk #": Works(
        "a group would be judged by its best 0 experts: all are equal, the first ones win"
    ),
    "--hidden-size # is not a multiple of --num-attention-heads #": Works(
        "heads would be narrower than they should, rounded down in silence"
    ),
    "--recompute-modules moe_act needs Transformer Engine's grouped experts": Works(
        "nothing is recomputed: no memory is saved"
    ),
    "--recompute-num-layers # exceeds the # layers of a stage": Works(
        "more than all layers: block recomputation takes all, and another layout would not"
    ),
    r"--\S+ #( and --\S+ #)* are different ways to split stages": Works(_TWO_WAYS),
}
"""By rule, as `kind` names it. Any other rule must reject only settings that do not work."""

HANGS = ("--recompute-modules mlp hangs with --add-bias-linear",)
"""Rules against runs that hang; other runs may time out because the machine is slow."""


def kind(problem: str) -> str:
    """Return the rule of a problem: its text without numbers, layouts and remedies."""
    return re.sub(r"E[tmL|]+|[0-9]+(\.[0-9]+)?", "#", re.split(": | \\(|, ", problem)[0])


def exception(rule: str) -> Works | None:
    """Return the first entry of WORKS that matches the rule."""
    return next((works for words, works in WORKS.items() if re.fullmatch(words, rule)), None)


def sample() -> dict[str, Draw]:
    """Return, by rule, the first draw that breaks only this rule."""
    chosen: dict[str, Draw] = {}
    for seed in range(SEEDS):
        one = draw(seed)
        if len(broken := one.problems) == 1:
            chosen.setdefault(kind(broken[0]), one)
    return chosen


def verdict(reference: Attempt, result: Attempt) -> tuple[str, str]:
    """Return a verdict and its basis."""
    if isinstance(reference, Result) and isinstance(result, Result):
        found = compare(reference, result)
        text = f"{found.loss:.1e} {found.grad_norm:.1e} {found.gradient:.1e} {found.parameter}"
        if found.within(TOLERANCE):
            return "same", text
        return "unclear" if found.within(CLEARLY) else "differs", text
    text = str(result).strip().splitlines()[-1]
    return "late" if "running at the timeout" in text else "fails", text


def test_a_verdict_needs_a_clear_difference() -> None:
    def result(loss: float) -> Result:
        return Result([loss], [1.0], {})

    words = [verdict(result(1.0), result(loss))[0] for loss in (1.0 + 1e-6, 1.0 + 5e-5, 1.01)]
    assert words == ["same", "unclear", "differs"]


def test_the_sample_breaks_every_rule_of_the_table_of_exceptions() -> None:
    rules = list(sample())
    assert len(rules) >= 45
    assert not [words for words in WORKS if not any(re.fullmatch(words, rule) for rule in rules)]


def _alone(draws: dict[str, Draw], folder: Path) -> tuple[dict[str, Attempt], list[str]]:
    """Return the result of each draw on one process, and the unexpected ones."""
    runs = {
        rule: Run(one.one_rank, str(folder / str(one.seed)), write=True)
        for rule, one in draws.items()
    }
    without = {}
    for rule, one in draws.items():
        if (works := exception(rule)) and works.instead:
            plain = replace(one, values={**one.values, **works.instead})
            without[rule] = Run(plain.one_rank, str(folder / str(one.seed)))
    references, wrong = dict(attempts(runs, 1, TIME_LIMIT_S)), []
    for rule, result in attempts(without, 1, TIME_LIMIT_S):
        word, text = verdict(references[rule], result)
        print(f"{title(draws[rule])}: {rule}: ignored: {word}: {text}", flush=True)
        wrong += [f"{rule}: not ignored: {text}"] if word != "same" else []
    for rule, result in references.items():
        accepted = not problems(draws[rule].one_rank, 1, device="cpu", te=False)
        if accepted and not isinstance(result, Result):
            wrong.append(f"{title(draws[rule])}: accepted on one process, where it fails: {result}")
    return references, wrong


@pytest.mark.parallel_full
@pytest.mark.timeout(1800)
def test_rejected_draws_do_not_train_as_on_one_process(tmp_path: Path) -> None:
    draws = sample()
    references, wrong = _alone(draws, tmp_path)
    by_ranks: dict[int, dict[str, Run]] = defaultdict(dict)
    counts: Counter[str] = Counter()
    for rule, one in draws.items():
        if isinstance(references[rule], Result):
            by_ranks[one.ranks][rule] = Run(one.settings, str(tmp_path / str(one.seed)))
        else:
            counts["fails on one rank"] += 1
            reason = str(references[rule]).strip().splitlines()[-1]
            print(f"{title(one)}: {rule}: fails on one rank: {reason}", flush=True)
    for ranks, runs in by_ranks.items():
        for rule, result in attempts(runs, ranks, TIME_LIMIT_S):
            word, text = verdict(references[rule], result)
            line = f"{title(draws[rule])}: {rule}: {word}: {text}"
            print(line, flush=True)
            counts[word] += 1
            allowed = {"same": exception(rule) is not None, "late": rule in HANGS, "unclear": False}
            if not allowed.get(word, True):
                wrong.append(line)
    print(dict(counts))
    assert not wrong, "\n".join(wrong)
