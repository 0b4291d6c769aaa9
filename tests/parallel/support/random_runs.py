"""Run random draws even if some fail, and name them by layout."""

from collections.abc import Iterator, Mapping

from moetron.moe.verify.parity import Result, Tolerance
from tests.parallel.support.harness import RankFailed
from tests.parallel.support.parity_ranks import Run, results_of
from tests.parallel.support.random_layouts import Draw

STEPS = 2
TOLERANCE = Tolerance(loss=1e-5, grad_norm=1e-3, gradient=1e-4)

_TOGETHER = 8
"""Runs on the same processes: each leaves about twenty gloo threads."""

Attempt = Result | RankFailed | AssertionError


def attempts(
    runs: Mapping[str, Run], ranks: int, timeout_s: float = 120
) -> Iterator[tuple[str, Attempt]]:
    """Yield the result or error of each run, with ``timeout_s`` each."""
    left = list(runs)
    while left:
        try:
            chosen = {name: runs[name] for name in left[:_TOGETHER]}
            for name, result, _ in results_of(chosen, ranks, STEPS, timeout_s=timeout_s):
                left.remove(name)
                yield name, result
        except (RankFailed, AssertionError) as error:
            yield left.pop(0), error


def title(one: Draw) -> str:
    """Return a name: seed, layout, uncommon settings and ranks."""
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
    router = one.values.get("moe_router_type", "")
    return f"seed {one.seed}: {words or 'dp'} on {one.ranks} {router}".rstrip()
