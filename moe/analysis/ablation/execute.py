"""Execution of sweeps: all unfinished runs in parallel, or one run."""

import fcntl
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from moetron.common.errors import UserError
from moetron.common.process import EXIT_STOPPED
from moetron.common.text import value_text
from moetron.moe.analysis.ablation.sweep import Run, Sweep
from moetron.moe.checkpoint import run_folder as checkpoint_folder
from moetron.moe.config import recipe
from moetron.moe.config.schema.field import flag_name
from moetron.moe.config.schema.settings import Settings, fields
from moetron.moe.config.validate import validate

RECIPE = "recipe.yaml"
LOG = "log.txt"
_UPCYCLED = "upcycled"
_LOCK = ".lock"
_POLL_S = 0.2


def finished(run: Run, output: Path) -> bool:
    """Return whether the run's last step is saved."""
    return checkpoint_folder.latest_step(output / run.name) == run.settings.training.train_iters


def ended(run: Run, output: Path) -> bool:
    """Return whether the run is finished or its loss became non-finite.

    A checkpoint of a non-finite run cannot be loaded.
    """
    if finished(run, output):
        return True
    from moetron.moe.analysis.curves import read_rows  # imports matplotlib: one second

    rows = read_rows(output / run.name / "metrics.jsonl")
    return bool(rows) and not math.isfinite(rows[-1]["lm_loss"])


def prepare(run: Run, output: Path) -> Path:
    """Create the run's folder with its recipe; return it.

    Raises:
        UserError: the folder has a run with other settings.
    """
    folder = output / run.name
    checkpoint_folder.make_run_folder(folder, "--output")
    if not (folder / RECIPE).exists():
        recipe.write(run.settings, folder / RECIPE)
    refuse_others([run], output)
    return folder


def refuse_others(runs: Sequence[Run], output: Path) -> None:
    """Raise UserError if folders of these runs, finished or not, have runs with other settings."""
    found = []
    for run in runs:
        path = output / run.name / RECIPE
        before = validate(recipe.read(path))[0] if path.exists() else run.settings
        if before != run.settings:
            found.append(f"  {path.parent}: {', '.join(_differences(before, run.settings))}")
    if found:
        raise UserError(
            "runs with other settings are there; give another --output, or the sweep and the flags "
            "after -- that they were made with:\n" + "\n".join(found)
        )


def _differences(before: Settings | None, now: Settings) -> Iterator[str]:
    """Yield the flags that differ from a run's recipe; None: it is not valid any more."""
    if before is None:
        yield f"its {RECIPE} is not valid"
        return
    for group, name, _ in fields():
        old, new = (getattr(getattr(settings, group), name) for settings in (before, now))
        if old != new:
            yield f"{flag_name(name)} {value_text(old)}, now {value_text(new)}"


def training_command(
    sweep: Sweep, run: Run, output: Path, program: Sequence[str], threads: int
) -> list[str]:
    """Return the command that trains a prepared run; upcycle its start if needed.

    Non-finite losses do not end the run, since sweeps count unstable runs.

    Raises:
        UserError: its source run is not finished.
    """
    folder = output / run.name
    source = sweep.source(run)
    load = [str(folder)]
    if source is not None and checkpoint_folder.latest_step(folder) is None:
        if not finished(source, output):
            raise UserError(f"{run.name} starts from {source.name}, which is not finished")
        load = [str(_upcycled(run, output / source.name, folder / _UPCYCLED)), "--finetune"]
    python = [sys.executable]
    if sweep.ranks > 1:
        launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", str(sweep.ranks))
        python += ["-m", *launcher]
    words = ["--config", str(folder / RECIPE), "--save", str(folder), "--load", *load]
    if run.settings.parallel.cpu_threads == 0:
        words += ["--cpu-threads", str(threads)]
    return [*python, *program, *words, "--no-check-for-nan-in-loss-and-grad"]


def _upcycled(run: Run, source: Path, target: Path) -> Path:
    """Upcycle the last checkpoint of ``source`` to ``target``; return ``target``."""
    from moetron.moe.convert.upcycle import dense_run, upcycle  # imports torch: seconds

    assert run.upcycle is not None
    if checkpoint_folder.latest_step(target) is None:
        upcycle(dense_run(source), target, run.settings.moe, run.upcycle)
    return target


def run_all(
    sweep: Sweep,
    output: Path,
    jobs: int,
    command: Callable[[str], Sequence[str]],
    stop_requested: Callable[[], bool],
) -> dict[Run, int]:
    """Run all unfinished runs, sources before their upcycled runs; return their exit codes.

    Args:
        sweep: runs, numbered from 0.
        output: folder of the sweep; each run writes its output to its ``log.txt``.
        jobs: parallel runs.
        command: run number -> command.
        stop_requested: polled; when True, runs get SIGTERM, save and end.
    """
    if jobs < 1:
        raise UserError(f"--jobs {jobs}: must be at least 1")
    waiting = [run for run in sweep.runs if not ended(run, output)]
    running: dict[Run, subprocess.Popen[bytes]] = {}
    codes: dict[Run, int] = {}
    stopping = False
    while waiting or running:
        if stop_requested() and not stopping:
            stopping, waiting = True, []
            for process in running.values():
                process.terminate()
        for run in _ready(sweep, waiting, output)[: jobs - len(running)]:
            waiting.remove(run)
            running[run] = _start(prepare(run, output), command(str(sweep.runs.index(run))))
            print(f"{run.name}: started", flush=True)
        for run, process in list(running.items()):
            if (code := process.poll()) is not None:
                del running[run]
                codes[run] = code
                print(f"{run.name}: {_status(code, stopping)}", flush=True)
        if not running and waiting and not _ready(sweep, waiting, output):
            codes.update(dict.fromkeys(waiting, 1))  # their source failed
            waiting = []
        time.sleep(_POLL_S)
    return codes


def slurm_script(sweep: Sweep, command: Sequence[str]) -> str:
    """Return a shell script that submits all runs as SLURM arrays.

    Upcycled runs are a second array, which waits for the first.

    Args:
        sweep: runs, numbered from 0.
        command: reads the run number from ``SLURM_ARRAY_TASK_ID``.
    """
    first = sum(run.upcycle is None for run in sweep.runs)
    submit = f"sbatch --parsable --job-name {sweep.name} --requeue --signal B:TERM@300"
    lines = [
        "#!/usr/bin/env bash",
        f"# Submit {len(sweep.runs)} runs. Runs that are finished end immediately.",
        "# SBATCH_PARTITION, SBATCH_GPUS, SBATCH_TIMELIMIT and the like are variables of sbatch.",
        "set -euo pipefail",
        f"run={shlex.quote('exec ' + shlex.join(command))}",
        f'runs="$({submit} --array 0-{first - 1} --wrap "$run")"',
    ]
    if first < len(sweep.runs):
        after = f'--array {first}-{len(sweep.runs) - 1} --dependency "afterany:${{runs%%;*}}"'
        lines.append(f'{submit} {after} --wrap "$run"')
    return "\n".join(lines)


def _ready(sweep: Sweep, waiting: Sequence[Run], output: Path) -> list[Run]:
    """Return the runs that need not wait for another one."""
    sources = [(run, sweep.source(run)) for run in waiting]
    return [run for run, source in sources if source is None or finished(source, output)]


def _start(folder: Path, command: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a run in its own session, so that Ctrl-C reaches only this process."""
    with (folder / LOG).open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def _status(code: int, stopping: bool) -> str:
    if code == 0:
        return "finished"
    if stopping or code == EXIT_STOPPED:
        return "stopped; the same command resumes it"
    return f"failed with exit code {code}: see {LOG}"


def exec_training(
    sweep: Sweep, run: Run, output: Path, program: Sequence[str], threads: int
) -> None:
    """Replace this process with the training of a run.

    Raises:
        UserError: another process trains it, or `training_command` raises.
    """
    lock = os.open(prepare(run, output) / _LOCK, os.O_CREAT | os.O_WRONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"{output / run.name}: another process trains this run") from error
    os.set_inheritable(lock, True)  # held until the training ends
    command = training_command(sweep, run, output, program, threads)
    sys.stdout.flush()
    os.execv(command[0], command)
