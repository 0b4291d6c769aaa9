"""The training runs of a parity check, sequential, each in its own processes."""

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
    """A run failed or timed out; the message has its last lines."""


def fitting(layouts: Iterable[Layout], flags: list[str], settings: Settings) -> list[Layout]:
    """Return the ``layouts`` that the checks of the settings accept.

    Raises:
        ConfigError: none; it has the problems of each.
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
    """Common parameters of all runs of a check."""

    program: Sequence[str]
    """Arguments of the interpreter that start training."""
    flags: list[str]
    settings: Settings
    """Settings of ``flags``."""
    folder: Path
    """Folder for the runs' outputs."""
    steps: int
    timeout_s: float
    """Limit for one run."""

    def changed(self, flags: list[str]) -> "Runs":
        """Return the same runs with additional ``flags``, which take precedence."""
        return replace(self, flags=[*self.flags, *flags])

    def write_start(self) -> Path:
        """Train one step on one rank; return its folder, the source of the others' weights."""
        start = self.folder / "start"
        self._run(Layout(), ["--load=none", "--save-interval=none", "--exit-interval=1"], start)
        return start

    def train(self, layout: Layout, start: Path) -> Result:
        """Train in ``layout`` from the weights of ``start`` and return the result."""
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
    """Train on one rank and in each layout; return the first result and the others' differences.

    Raises:
        RunFailed: names the layout.
    """
    reference = runs.train(Layout(), start)
    found = {}
    for layout in layouts:
        print(f"training in {layout.name}", file=sys.stderr)
        found[layout.name] = compare(reference, runs.train(layout, start))
    return reference, found
