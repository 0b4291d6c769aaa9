"""Accepted settings train as on one process; rejected ones are explained.

A draw is a function of its seed: any block of seeds, or a single one, can be rerun.
"""

from collections import Counter, defaultdict
from pathlib import Path
from typing import get_args

import pytest

from moetron.moe.config.schema.experts import MoESettings
from moetron.moe.verify.parity import Result, compare, line
from tests.parallel.support.parity_ranks import Run
from tests.parallel.support.random_layouts import draw
from tests.parallel.support.random_runs import TOLERANCE, attempts, title

DRAWS, BLOCK = 200, 25


def test_most_draws_are_accepted_and_all_others_explained() -> None:
    draws = [draw(seed) for seed in range(DRAWS)]
    refused = [one.problems for one in draws if one.problems]
    assert 0.2 * DRAWS < len(refused) < 0.5 * DRAWS
    for problem in (problem for problems in refused for problem in problems):
        assert "--" in problem and len(problem) < 400 and "\n" not in problem, problem


def test_accepted_draws_have_every_router_and_every_way_to_split_stages() -> None:
    accepted = [one.settings for one in map(draw, range(DRAWS)) if not one.problems]
    routers = {chosen.moe.moe_router_type for chosen in accepted}
    assert routers == set(get_args(MoESettings.model_fields["moe_router_type"].annotation))
    splits = Counter(
        name
        for chosen in accepted
        for name, value in chosen.parallel
        if name.startswith(("decoder_", "account_", "pipeline_model_parallel_layout")) and value
    )
    assert len(splits) == 5 and min(splits.values()) >= 3, splits


@pytest.mark.parallel_full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("first", range(0, DRAWS, BLOCK))
def test_accepted_draws_train_as_on_one_process(tmp_path: Path, first: int) -> None:
    draws = {str(seed): draw(seed) for seed in range(first, first + BLOCK)}
    accepted = {name: one for name, one in draws.items() if not one.problems}
    counts = Counter(drawn=len(draws), refused=len(draws) - len(accepted))
    single = {
        name: Run(one.one_rank, str(tmp_path / name), write=True) for name, one in accepted.items()
    }
    references = dict(attempts(single, 1))
    by_ranks: dict[int, dict[str, Run]] = defaultdict(dict)
    for name, one in accepted.items():
        by_ranks[one.ranks][name] = Run(one.settings, str(tmp_path / name))
    wrong = []
    for ranks, runs in by_ranks.items():
        for name, result in attempts(runs, ranks):
            reference, named = references[name], title(accepted[name])
            failure = next((x for x in (reference, result) if not isinstance(x, Result)), None)
            if isinstance(reference, Result) and isinstance(result, Result):
                found = compare(reference, result)
                print(line(f"{named:<48}", found, TOLERANCE))
                verdict = "same" if found.within(TOLERANCE) else "different"
            else:
                found, verdict = failure, "exception"
            counts[verdict] += 1
            wrong += [f"{named}: {found}"] if verdict != "same" else []
    print(dict(counts))
    assert not wrong, "\n".join(wrong)
