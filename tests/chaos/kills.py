"""Kill runs at random moments, resume them, and compare each with an uninterrupted run.

    bash tests/run.sh --chaos [--kills 60] [--seed 1] [--keep FOLDER]

Victims: one rank, the launcher, the process group of a rank, or every process of the job; moments:
during the start, in a step, in a save. Runs have 2 or 4 ranks, blocking or background saves,
dropout, random routing and loader workers. Equal means: metrics and evaluations of all steps and
every tensor of the last checkpoint, random-number states included, bit for bit. After a kill no
process of the job may run for more than 10 s. The table at the end counts what happened, not what
was planned: a kill that came too late, because the run had ended, is repeated.
"""

import argparse
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from moetron.moe.checkpoint.run_folder import latest_step
from tests.parallel.support.checkpoint_runs import metrics, tensors

ROOT = Path(__file__).resolve().parents[2]
VICTIMS = ("rank", "launcher", "group", "all")
MOMENTS = ("start", "step", "save")
GONE_S = 10.0
LIFE_S = 300.0
"""Limit of one life, on busy cores."""
TOKEN = "MOETRON_CHAOS"
"""Environment variable that all processes of a job inherit."""
FLAGS = """\
    --seq-length 32 --micro-batch-size 1 --global-batch-size 8 --save-interval 2 --keep-last 3
    --mock-data --eval-interval 5 --eval-iters 1 --hidden-dropout 0.1 --attention-dropout 0.1
    --moe-input-jitter-eps 0.1 --use-distributed-optimizer --expert-model-parallel-size 2
    --lr-warmup-iters 4 --no-tensorboard --peak-tflops-per-s 1 --cpu-threads 1"""


@dataclass(frozen=True)
class Layout:
    """How the runs of one uninterrupted run are started."""

    ranks: int
    background: bool
    workers: int
    steps: int

    @property
    def name(self) -> str:
        """Row of the table."""
        return f"{self.ranks} ranks, {'background' if self.background else 'blocking'} saves"


@dataclass
class Counts:
    """Of one layout."""

    kills: dict[tuple[str, str], int] = field(default_factory=dict)
    missed: int = 0
    runs: int = 0
    different: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    slowest_end_s: float = 0.0


class Life:
    """One start of a job."""

    def __init__(self, layout: Layout, folder: Path) -> None:
        self.folder, self.layout = folder, layout
        self.token = f"{folder.name}-{time.monotonic_ns()}"
        self.log = folder.with_suffix(".log")
        recipe = ROOT / "examples" / "olmoe_1b_7b" / "tiny.yaml"
        flags = [*FLAGS.split(), "--num-workers", str(layout.workers)]
        flags += ["--train-iters", str(layout.steps), "--save", str(folder), "--load", str(folder)]
        flags += ["--async-save"] if layout.background else []
        launch = [sys.executable, str(ROOT / "tools" / "launch.py")]
        launch += ["--nproc-per-node", str(layout.ranks), str(ROOT / "pretrain_moe.py")]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), TOKEN: self.token}
        self.rows_before, self.since = self.rows(), time.monotonic()
        with self.log.open("ab") as file:
            self.launcher = subprocess.Popen(
                [*launch, "--config", str(recipe), *flags],
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> "Life":
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.family():
            process.kill()

    def rows(self) -> int:
        """Return the lines of metrics.jsonl."""
        with suppress(FileNotFoundError):
            return (self.folder / "metrics.jsonl").read_bytes().count(b"\n")
        return 0

    def family(self) -> list[psutil.Process]:
        """Return all live processes of this job, whoever their parents are."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(TOKEN) == self.token:
                    found.append(process)
        return found

    def wait_for(self, moment: str, chance: random.Random, start_s: float) -> bool:
        """Wait for a random moment of this kind; return whether the job still runs."""
        if moment == "start":
            time.sleep(chance.uniform(0.2, start_s))
            return self.launcher.poll() is None and self.rows() <= self.rows_before
        while self.rows() <= self.rows_before + 1 and self.alive():
            time.sleep(0.01)
        if moment == "step":
            time.sleep(chance.uniform(0.0, 1.0))
        else:
            while not any(self.folder.glob("step_*.tmp")) and self.alive():
                time.sleep(0.0005)
            time.sleep(chance.uniform(0.0, 0.03))
        return self.launcher.poll() is None

    def alive(self) -> bool:
        """Return whether the job runs; raise if it takes too long."""
        if time.monotonic() - self.since > LIFE_S:
            raise TimeoutError(f"{self.log}: not ended after {LIFE_S} s")
        return self.launcher.poll() is None

    def kill(self, victim: str, chance: random.Random) -> bool:
        """Kill; return whether the victim was there."""
        children = sorted(psutil.Process(self.launcher.pid).children(), key=lambda p: p.pid)
        rank = chance.choice(children) if children else None
        with suppress(psutil.Error, ProcessLookupError):
            if victim == "launcher":
                self.launcher.kill()
            elif victim == "all":
                for process in self.family():
                    with suppress(psutil.Error):
                        process.kill()
            elif rank is None:
                return False
            elif victim == "rank":
                rank.kill()
            else:
                os.killpg(os.getpgid(rank.pid), signal.SIGKILL)
            return True
        return False

    def end(self) -> tuple[list[str], float]:
        """Wait until nothing of the job runs; return what is left after 10 s, and seconds."""
        since = time.monotonic()
        with suppress(subprocess.TimeoutExpired):
            self.launcher.wait(GONE_S)
        while (left := self.family()) and time.monotonic() - since < GONE_S:
            time.sleep(0.1)
        seconds = time.monotonic() - since
        names = [f"{process.pid} {' '.join(process.cmdline())[:80]}" for process in left]
        for process in left:
            process.kill()
        self.launcher.wait()
        return names, seconds

    def complete(self) -> None:
        """Wait for the end of training; raise if it failed."""
        while self.alive():
            time.sleep(0.05)
        if self.launcher.returncode != 0:
            raise RuntimeError(f"{self.log}: exit code {self.launcher.returncode}")


def differences(one: Path, other: Path) -> list[str]:
    """Return in what two finished runs differ."""
    found = []
    if metrics(one) != metrics(other):
        found.append("metrics")
    if (one / "validation.jsonl").read_text() != (other / "validation.jsonl").read_text():
        found.append("validation")
    step = latest_step(one)
    if step != latest_step(other):
        return [*found, "last step"]
    mine, theirs = (tensors(folder / f"step_{step:07}", states=True) for folder in (one, other))
    if mine.keys() != theirs.keys():
        return [*found, "names of tensors"]
    return found + [name for name in mine if not torch.equal(mine[name], theirs[name])]


def harass(
    layout: Layout, plan: list[tuple[str, str]], folder: Path, chance: random.Random
) -> Counts:
    """Run until all kills of ``plan`` have happened, and compare every finished run."""
    counts, straight = Counts(), folder / "straight"
    with Life(layout, straight) as life:
        while life.rows() == 0 and life.alive():
            time.sleep(0.02)
        start_s = time.monotonic() - life.since
        life.complete()
    for number in itertools.count():
        run = folder / f"run_{number}"
        while not one_life(layout, plan, run, chance, start_s, counts):
            pass
        counts.runs += 1
        if found := differences(straight, run):
            counts.different.append(f"{run}: {', '.join(found[:5])} ({len(found)})")
        else:
            shutil.rmtree(run)
        if not plan:
            return counts
    raise AssertionError


def one_life(
    layout: Layout,
    plan: list[tuple[str, str]],
    run: Path,
    chance: random.Random,
    start_s: float,
    counts: Counts,
) -> bool:
    """Start a run or resume it; make the first kill of ``plan``; return whether the run ended."""
    with Life(layout, run) as life:
        if plan:
            victim, moment = plan[0]
            if life.wait_for(moment, chance, start_s) and life.kill(victim, chance):
                counts.kills[plan[0]] = counts.kills.get(plan[0], 0) + 1
                plan.pop(0)
                left, seconds = life.end()
                counts.left += left
                counts.slowest_end_s = max(counts.slowest_end_s, seconds)
                said = f"{layout.name}: {victim} at {moment}, ended in {seconds:.1f} s"
                print(said, flush=True)
                return False
            counts.missed += 1
        life.complete()
        return True


def plans(kills: int, layouts: int, chance: random.Random) -> Iterator[list[tuple[str, str]]]:
    """Yield each layout's kills: all kinds alike, in random order; layouts of 2 ranks get more."""
    kinds = list(itertools.product(VICTIMS, MOMENTS))
    chance.shuffle(kinds)
    every = list(itertools.islice(itertools.cycle(kinds), kills))
    weights = [2, 2, 1, 1][:layouts]
    start = 0.0
    for weight in weights:
        end = start + kills * weight / sum(weights)
        yield every[round(start) : round(end)]
        start = end


def table(found: dict[Layout, Counts]) -> str:
    """Return the counts by layout, victim and moment."""
    lines = ["", "| layout | kills | rank | launcher | group | all | start | step | save |"]
    lines[1] += " too late | runs | different | left after 10 s | slowest end |"
    for layout, counts in found.items():
        by = [sum(n for kind, n in counts.kills.items() if name in kind) for name in VICTIMS]
        by += [sum(n for kind, n in counts.kills.items() if name in kind) for name in MOMENTS]
        numbers = [sum(counts.kills.values()), *by, counts.missed, counts.runs]
        numbers += [len(counts.different), len(counts.left)]
        cells = " | ".join(map(str, numbers))
        lines.append(f"| {layout.name} | {cells} | {counts.slowest_end_s:.1f} s |")
    return "\n".join(lines)


def run(layouts: list[Layout], kills: int, seed: int, folder: Path) -> dict[Layout, Counts]:
    """Harass every layout; return the counts."""
    chance, found = random.Random(seed), dict[Layout, Counts]()
    for number, plan in enumerate(plans(kills, len(layouts), chance)):
        layout, place = layouts[number], folder / f"layout_{number}"
        place.mkdir(parents=True)
        found[layout] = harass(layout, plan, place, chance)
    return found


def main() -> int:
    """Print the table; return 1 if a run differed or a process was left."""
    parser = argparse.ArgumentParser(prog="tests/run.sh --chaos", description=__doc__)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=40, help="of each run")
    parser.add_argument("--workers", type=int, default=2, help="loader workers of each rank")
    parser.add_argument("--keep", type=Path, help="folder for runs and logs")
    options = parser.parse_args()
    layouts = [
        Layout(ranks, background, options.workers, options.steps)
        for ranks in (2, 4)
        for background in (False, True)
    ]
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        found = run(layouts, options.kills, options.seed, options.keep or Path(temporary))
    print(table(found))
    wrong = [line for counts in found.values() for line in (*counts.different, *counts.left)]
    print("\n".join(wrong) if wrong else "all runs equal, nothing left running")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
