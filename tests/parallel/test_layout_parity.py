"""Every layout against one process, from one checkpoint: losses, gradient norms, all gradients.

Ten steps (half of them in the default run) of Adam with warm-up, weight decay, clipping, balance
and z losses, a shared expert, grouped GEMM and uneven loss masks, fp32. Layouts of one size share
their processes.
"""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import pytest

from moetron.moe.plan.named_layouts import parse
from moetron.moe.training.parity import Result, compare, line
from moetron.moe.training.report import Row
from tests.parallel.parity_cases import MODES, QUICK, layouts, num_layers, settings, tolerance
from tests.parallel.parity_ranks import Run, results_of

STEPS = 10


class References:
    """What one process does, by mode and number of layers; written and trained when asked for."""

    def __init__(self, folder: Path, steps: int, device: str = "cpu") -> None:
        self.steps = steps
        self.device = device
        self._folder = folder
        self._known: dict[tuple[str, int], tuple[Result, list[Row]]] = {}

    def weights(self, mode: str, layers: int) -> str:
        return str(self._folder / f"{mode}-{layers}")

    def of(self, mode: str, layers: int) -> tuple[Result, list[Row]]:
        if (mode, layers) not in self._known:
            one = settings("dp1", layers, **MODES[mode])
            run = Run(one, self.weights(mode, layers), write=True)
            ((_, result, rows),) = results_of({"one": run}, 1, self.steps, self.device)
            self._known[mode, layers] = result, rows
        return self._known[mode, layers]


def _same(references: References, mode: str, layouts: Iterable[str]) -> None:
    """Train in all ``layouts`` and print how they compare; all of them must agree."""
    launches = defaultdict(list)
    for name in layouts:
        launches[parse(name).smallest_world_size, num_layers(name)].append(name)
    wrong = []
    for (ranks, layers), names in launches.items():
        reference, expected = references.of(mode, layers)
        weights = references.weights(mode, layers)
        runs = {name: Run(settings(name, layers, **MODES[mode]), weights) for name in names}
        for name, result, rows in results_of(runs, ranks, references.steps, references.device):
            found = compare(reference, result)
            print(line(f"{mode:<10} {name:<18}", found, tolerance(name)))
            if not found.within(tolerance(name)):
                wrong.append(f"{name}: {found}")
            for step, (ours, theirs) in enumerate(zip(expected, rows, strict=True), 1):
                if theirs != pytest.approx(ours, rel=tolerance(name).grad_norm):
                    wrong.append(f"{name}, step {step}: {theirs} instead of {ours}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("mode", QUICK)
def test_two_ranks_equal_one(tmp_path: Path, mode: str) -> None:
    _same(References(tmp_path, STEPS // 2), mode, QUICK[mode])


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> References:
    return References(tmp_path_factory.mktemp("weights"), STEPS)


@pytest.mark.parallel_full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("mode", MODES)
def test_every_layout_equals_one_process(references: References, mode: str, ranks: int) -> None:
    """The table that `bash tests/run.sh --parallel-full` prints."""
    _same(references, mode, layouts(ranks))
