"""What our checks accept trains as one process does; what they refuse they explain.

A draw is a function of its seed: any block of seeds, and any one of them, can be run again alone.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from moetron.moe.training.parity import Result, Tolerance, compare, line
from tests.parallel.harness import RankFailed
from tests.parallel.parity_ranks import Run, results_of
from tests.parallel.random_layouts import Draw, draw

DRAWS, BLOCK, STEPS = 200, 25, 2
TOLERANCE = Tolerance(loss=1e-5, grad_norm=1e-3, gradient=1e-4)


def _attempts(
    runs: Mapping[str, Run], ranks: int
) -> Iterator[tuple[str, Result | RankFailed | AssertionError]]:
    """What each run gives, though some fail."""
    left = list(runs)
    while left:
        try:
            for name, result, _ in results_of({name: runs[name] for name in left}, ranks, STEPS):
                left.remove(name)
                yield name, result
        except (RankFailed, AssertionError) as error:
            yield left.pop(0), error


def _layout(one: Draw) -> str:
    sizes = {
        short: one.values.get(f"{name}_parallel_size") or 0
        for short, name in (
            ("tp", "tensor_model"),
            ("pp", "pipeline_model"),
            ("cp", "context"),
            ("ep", "expert_model"),
            ("etp", "expert_tensor"),
        )
    }
    words = "".join(f"{short}{size}" for short, size in sizes.items() if size > 1)
    return f"seed {one.seed}: {words or 'dp'} on {one.ranks}"


def test_most_draws_are_accepted_and_all_others_explained() -> None:
    draws = [draw(seed) for seed in range(DRAWS)]
    refused = [one.problems for one in draws if one.problems]
    assert 0.2 * DRAWS < len(refused) < 0.5 * DRAWS
    for problem in (problem for problems in refused for problem in problems):
        assert "--" in problem and len(problem) < 400 and "\n" not in problem, problem


@pytest.mark.parallel_full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("first", range(0, DRAWS, BLOCK))
def test_what_is_accepted_trains_as_one_process_does(tmp_path: Path, first: int) -> None:
    draws = {str(seed): draw(seed) for seed in range(first, first + BLOCK)}
    accepted = {name: one for name, one in draws.items() if not one.problems}
    counts = Counter(drawn=len(draws), refused=len(draws) - len(accepted))
    alone = {
        name: Run(one.alone, str(tmp_path / name), write=True) for name, one in accepted.items()
    }
    references = dict(_attempts(alone, 1))
    by_ranks: dict[int, dict[str, Run]] = defaultdict(dict)
    for name, one in accepted.items():
        by_ranks[one.ranks][name] = Run(one.settings, str(tmp_path / name))
    wrong = []
    for ranks, runs in by_ranks.items():
        for name, result in _attempts(runs, ranks):
            reference, title = references[name], _layout(accepted[name])
            failure = next((x for x in (reference, result) if not isinstance(x, Result)), None)
            if isinstance(reference, Result) and isinstance(result, Result):
                found = compare(reference, result)
                print(line(f"{title:<36}", found, TOLERANCE))
                verdict = "same" if found.within(TOLERANCE) else "different"
            else:
                found, verdict = failure, "exception"
            counts[verdict] += 1
            wrong += [f"{title}: {found}"] if verdict != "same" else []
    print(dict(counts))
    assert not wrong, "\n".join(wrong)
