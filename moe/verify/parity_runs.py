"""The runs that a parity check compares: one after the other, each in processes of its own."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moetron.common.errors import ConfigError, UserError
from moetron.common.process import EXIT_USER
from moetron.moe.config.command import load
from moetron.moe.config.schema.settings import Settings
from moetron.moe.plan.named_layouts import Layout
from moetron.moe.verify.parity import Difference, Result, compare, read_result

TAIL_LINES = 15


class RunFailed(RuntimeError):
    """A run ended with another exit code than 0, or not in time; the message has its last lines."""


def fitting(layouts: Iterable[Layout], flags: list[str], settings: Settings) -> list[Layout]:
    """Those of ``layouts`` that the checks of the settings accept.

    Raises:
        ConfigError: none is; with what is wrong with each.
    """
    fit, problems = [], []
    for layout in layouts:
        world = ["--dry-run", f"--world-size={layout.smallest_world_size}"]
        try:
            load([*flags, *layout.flags(settings), *world])
            fit.append(layout)
        except ConfigError as error:
            problems += [f"{layout.name}: {problem}" for problem in error.problems]
    if not fit:
        raise ConfigError(problems)
    return fit


@dataclass(frozen=True)
class Runs:
    """What all runs of a check have in common."""

    program: Sequence[str]
    """Words after the interpreter that start training."""
    flags: list[str]
    settings: Settings
    """What ``flags`` mean."""
    folder: Path
    """For what the runs write."""
    steps: int
    timeout_s: float
    """Of one run."""

    def changed(self, flags: list[str]) -> "Runs":
        """The same runs with ``flags``, which win."""
        return replace(self, flags=[*self.flags, *flags])

    def write_start(self) -> Path:
        """Train one step on one rank; returns the run's folder, whose weights the others take."""
        start = self.folder / "start"
        self._run(Layout(), ["--load=none", "--save-interval=none", "--exit-interval=1"], start)
        return start

    def train(self, layout: Layout, start: Path) -> Result:
        """What a run in ``layout`` from the weights of ``start`` does."""
        save = self.folder / layout.name
        flags = [f"--load={start}", "--finetune", "--save-interval=1", "--keep-last=none"]
        self._run(layout, [*flags, f"--exit-interval={self.steps}"], save)
        result = read_result(save, self.settings)
        shutil.rmtree(save)
        return result

    def _run(self, layout: Layout, flags: list[str], save: Path) -> None:
        ranks = layout.smallest_world_size
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        quiet = ["--eval-iters=0", "--eval-interval=none", "--no-tensorboard"]
        quiet += [f"--wandb-{name}=none" for name in ("project", "entity", "exp-name")]
        command = [
            *(sys.executable, *(torchrun if ranks > 1 else []), *self.program, *self.flags),
            *(*layout.flags(self.settings), *quiet, *flags),
            f"--save={save}",
        ]
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        with subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            try:
                output = process.communicate(timeout=self.timeout_s)[0]
            except subprocess.TimeoutExpired as error:
                process.terminate()  # torchrun ends its ranks
                raise RunFailed(f"{layout.name}: not done after {self.timeout_s:g} s") from error
        if process.returncode != 0:
            tail = "\n".join(output.splitlines()[-TAIL_LINES:])
            kind = UserError if process.returncode == EXIT_USER else RunFailed
            raise kind(f"{layout.name}: exit code {process.returncode}:\n{tail}")


def train_all(
    runs: Runs, layouts: Iterable[Layout], start: Path
) -> tuple[Result, dict[str, Difference]]:
    """One rank's result, and by name how far each layout is from it, all from ``start``'s weights.

    Raises:
        RunFailed: with the layout named.
    """
    reference = runs.train(Layout(), start)
    found = {}
    for layout in layouts:
        print(f"training in {layout.name}", file=sys.stderr)
        found[layout.name] = compare(reference, runs.train(layout, start))
    return reference, found
