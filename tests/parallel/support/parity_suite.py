"""Compare layouts with one process, all from one checkpoint; used on CPU and GPU."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from moetron.moe.monitoring.sinks import Row
from moetron.moe.plan.named_layouts import parse
from moetron.moe.verify.parity import Result, Tolerance, compare, line
from tests.parallel.support.parity_cases import MODES, num_layers, settings, tolerance
from tests.parallel.support.parity_ranks import Run, results_of


@dataclass
class Suite:
    """Runs of the tiny model; the run on one process is cached."""

    folder: Path
    steps: int
    device: str = "cpu"
    changes: dict[str, Any] = field(default_factory=dict)
    """Settings of all runs in addition to the mode's."""
    samples: Callable[[int, int, int], Any] | None = None
    """See `Run.samples`."""
    slack: float = 1.0
    """Factor on all tolerances."""
    _known: dict[tuple[str, int], tuple[Result, list[Row]]] = field(default_factory=dict)

    def _run(self, mode: str, layout: str, layers: int) -> Run:
        changes = {**MODES[mode], **self.changes}
        chosen = settings(layout, layers, self.device, **changes)
        return Run(chosen, str(self.folder / f"{mode}-{layers}"), layout == "dp1", self.samples)

    def _reference(self, mode: str, layers: int) -> tuple[Result, list[Row]]:
        if (mode, layers) not in self._known:
            run = {"one": self._run(mode, "dp1", layers)}
            ((_, result, rows),) = results_of(run, 1, self.steps, self.device)
            self._known[mode, layers] = result, rows
        return self._known[mode, layers]

    def _tolerance(self, layout: str) -> Tolerance:
        given = tolerance(layout)
        return Tolerance(*(self.slack * bound for bound in vars(given).values()))

    def differences(self, mode: str, layouts: Iterable[str]) -> list[str]:
        """Train in all ``layouts``, print the comparison, return a line for each that differs."""
        launches = defaultdict(list)
        for name in layouts:
            launches[parse(name).smallest_world_size, num_layers(name)].append(name)
        wrong = []
        for (ranks, layers), names in launches.items():
            reference, expected = self._reference(mode, layers)
            runs = {name: self._run(mode, name, layers) for name in names}
            for name, result, rows in results_of(runs, ranks, self.steps, self.device):
                found, bounds = compare(reference, result), self._tolerance(name)
                print(line(f"{mode:<10} {name:<18}", found, bounds))
                if not found.within(bounds):
                    wrong.append(f"{name}: {found}")
                for step, (ours, theirs) in enumerate(zip(expected, rows, strict=True), 1):
                    if theirs != pytest.approx(ours, rel=bounds.grad_norm):
                        wrong.append(f"{name}, step {step}: {theirs} instead of {ours}")
        return wrong
