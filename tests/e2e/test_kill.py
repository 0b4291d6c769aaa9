"""Runs that are killed, fail on one rank or get SIGTERM: their exit and their checkpoints."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psutil
import pytest

from moetron.common import run_owner
from moetron.moe.checkpoint import run_folder as checkpoint_folder
from tests.parallel.support.checkpoint_runs import (
    assert_identical,
    metrics,
    parallel_of,
    settings,
    start,
    tensors,
)
from tests.parallel.support.harness import RankFailed, run_ranks

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 30.0
"""Time limit for a job to end after one of its ranks."""
LAUNCHER = [sys.executable, str(ROOT / "tools" / "launch.py"), "--nproc-per-node", "2"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]


@contextmanager
def job(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a job with its output in ``log``; kill it and its ranks on exit."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=log.parent, stdout=file, stderr=subprocess.STDOUT, env=environment
        )
        ranks: list[psutil.Process] = []
        try:
            yield process
        finally:
            alive = process.poll() is None
            ranks = psutil.Process(process.pid).children(recursive=True) if alive else []
            for survivor in (process, *ranks):
                survivor.kill()
            process.wait()


def wait_for(condition: Callable[[], object], process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until ``condition`` holds; fail if the job ends first."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def end_of(
    process: subprocess.Popen[bytes], log: Path, limit_s: float = LIMIT_S
) -> tuple[int, list[str]]:
    """Wait for the end; return exit code and last lines; fail if a rank survives."""
    ranks = psutil.Process(process.pid).children()
    code = process.wait(limit_s)
    gone, alive = psutil.wait_procs(ranks, timeout=5)
    assert not alive, gone
    return code, log.read_text().splitlines()[-30:]


def training(folder: Path, launcher: list[str] = TORCHRUN, *more: str) -> list[str]:
    """Return the command of an endless run of two ranks that saves every second step."""
    flags = "--train-iters 100000 --save-interval 2 --keep-last 2 --expert-model-parallel-size 2"
    recipe = ROOT / "examples" / "olmoe_1b_7b" / "tiny.yaml"
    script = str(ROOT / "pretrain_moe.py")
    chosen = ["--config", str(recipe), "--save", str(folder), *flags.split(), *more]
    return [*launcher, script, *chosen]


def test_a_killed_rank_ends_the_job_with_the_cause_named(tmp_path: Path) -> None:
    log, run_folder = tmp_path / "log", tmp_path / "run"
    with job(training(run_folder), log) as process:
        wait_for((run_folder / "latest").exists, process, log)
        _, victim = psutil.Process(process.pid).children()
        victim.kill()
        code, lines = end_of(process, log)
    assert code == 1
    assert any("Signal 9 (SIGKILL)" in line for line in lines), lines
    assert checkpoint_folder.read(run_folder).record.progress.step >= 2


def test_sigusr1_saves_and_ends_and_a_second_run_waits_outside(tmp_path: Path) -> None:
    log, run_folder = tmp_path / "log", tmp_path / "run"
    with job(training(run_folder, LAUNCHER), log) as process:
        wait_for((run_folder / "latest").exists, process, log)
        owner, *_ = psutil.Process(process.pid).children()
        for more in (["--check", "--world-size", "2"], ["--expert-model-parallel-size", "1"]):
            command = [sys.executable, *training(run_folder, [], *more)]
            again = subprocess.run(command, capture_output=True, text=True, timeout=60)
            assert again.returncode == 2, again.stderr
            assert f"belongs to a run that has not ended: process {owner.pid} on" in again.stderr
        process.send_signal(signal.SIGUSR1)
        code, lines = end_of(process, log)
    assert code == 75
    assert "SIGUSR1: stopping after this step" in log.read_text()
    assert lines[-1].startswith("stopped by a signal; saved in")
    assert "Traceback" not in log.read_text()
    last = checkpoint_folder.read(run_folder).record.progress
    assert last.step == metrics(run_folder)[-1]["step"], lines
    assert not (run_folder / "owner.json").exists()


def test_a_sigterm_to_every_process_of_the_job_saves(tmp_path: Path) -> None:
    """As of systemd and SLURM with proctrack/linuxproc: loader workers and writers get it too."""
    log, run_folder = tmp_path / "log", tmp_path / "run"
    command = training(run_folder, LAUNCHER, "--num-workers", "1", "--async-save")
    with job(command, log) as process:
        wait_for((run_folder / "latest").exists, process, log)
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 6  # two ranks, each with a writer and a worker
        for member in (process, *family):
            with contextlib.suppress(psutil.NoSuchProcess):
                member.send_signal(signal.SIGTERM)
        code, lines = end_of(process, log)
        _, alive = psutil.wait_procs(family, timeout=10)
    assert (code, alive) == (75, []), lines
    assert lines[-1].startswith("stopped by a signal; saved in")
    last = checkpoint_folder.read(run_folder).record.progress
    assert last.step == metrics(run_folder)[-1]["step"], lines


@pytest.mark.parametrize("launcher", [TORCHRUN, LAUNCHER], ids=["torchrun", "launch"])
def test_nothing_outlives_a_killed_launcher(tmp_path: Path, launcher: list[str]) -> None:
    """Ranks, loader workers and their helpers end within 10 s; the run continues afterwards."""
    log, run_folder = tmp_path / "log", tmp_path / "run"
    with job(training(run_folder, launcher, "--num-workers", "1"), log) as process:
        wait_for((run_folder / "latest").exists, process, log)
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 4
        process.kill()
        _, alive = psutil.wait_procs(family, timeout=10)
        assert not alive
    assert (run_folder / "owner.json").exists()
    run_owner.claim(run_folder).release()


FAILING = """
    import time, torch
    import torch.distributed as dist
    from moetron.common.process import run_guarded

    def main():
        dist.init_process_group("gloo")
        dist.barrier()
        if dist.get_rank() == 1:
            raise ArithmeticError("seven times eight")
        dist.all_reduce(torch.zeros(1))
        return 0

    raise SystemExit(run_guarded(main))
"""


def test_a_failing_rank_ends_the_waiting_ranks(tmp_path: Path) -> None:
    log, script = tmp_path / "log", tmp_path / "failing.py"
    script.write_text(textwrap.dedent(FAILING))
    with job([*TORCHRUN, str(script)], log) as process:
        code, lines = end_of(process, log)
    assert code == 1
    assert any("rank 1: ArithmeticError: seven times eight" in line for line in lines[-8:]), lines
    assert log.read_text().count("ArithmeticError: seven times eight") >= 2


def _save_until_killed(folder: str, layout: str, background: bool, after_s: float) -> None:
    checkpoint = {
        "save": folder,
        "load": folder,
        "save_interval": 1,
        "keep_last": 2,
        "async_save": background,
    }
    chosen = settings(layout, training={"train_iters": 100_000}, checkpoint=checkpoint)
    with parallel_of(chosen):
        loop = start(chosen)
        started_at = checkpoint_folder.latest_step(Path(folder))

        def die() -> None:
            while checkpoint_folder.latest_step(Path(folder)) == started_at:
                time.sleep(0.005)
            time.sleep(after_s)
            os.kill(os.getpid(), signal.SIGKILL)

        threading.Thread(target=die, daemon=True).start()
        loop.run(lambda: False)


def _kill_and_resume(folder: Path, layout: str, ranks: int, background: bool, kills: int) -> None:
    """Each run resumes from the killed one, saves, and is killed during a later save."""
    step = 0
    for number in range(kills):
        with pytest.raises(RankFailed, match=r"exit code -9|raised"):
            after_s = 0.037 * number
            run_ranks(_save_until_killed, ranks, str(folder), layout, background, after_s)
        last = checkpoint_folder.read(folder)
        checkpoint_folder.verify(last.folder)
        assert last.record.progress.step > step
        step = last.record.progress.step


def test_kill_at_random_times_of_a_run_that_saves_every_step(tmp_path: Path) -> None:
    _kill_and_resume(tmp_path / "run", "dp", 1, background=False, kills=6)


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True])
def test_two_ranks_killed_ten_times_while_they_save(tmp_path: Path, background: bool) -> None:
    _kill_and_resume(tmp_path / "run", "ep2_zero", 2, background, kills=10)


def _victims(process: subprocess.Popen[bytes], number: int) -> list[psutil.Process]:
    """Return whom the kill of this number hits: a rank, the launcher, a loader worker, or all."""
    launcher = psutil.Process(process.pid)
    ranks, everyone = launcher.children(), launcher.children(recursive=True)
    workers = [
        one for one in everyone if one not in ranks and "spawn_main" in " ".join(one.cmdline())
    ]
    kinds = [ranks[-1:], [launcher], ranks[:1], [launcher, *everyone], workers[:1] or ranks[:1]]
    return kinds[number % len(kinds)] or [launcher]  # no rank has started yet


def _has_lines(path: Path, count: int) -> bool:
    return path.exists() and len(path.read_text().splitlines()) >= count


@pytest.mark.slow
@pytest.mark.parametrize("background", ["--no-async-save", "--async-save"])
def test_random_kills_leave_no_trace(tmp_path: Path, background: str) -> None:
    """Ten kills of a run of two ranks with dropout and two workers each; then as if uninterrupted.

    Kills come at random moments: while it starts, in steps, in saves.
    """
    moments = random.Random(len(background))
    flags = f"--train-iters 40 --num-workers 2 --hidden-dropout 0.1 --cpu-threads 1 {background}"
    evaluated = "--eval-interval 10 --eval-iters 1 --no-tensorboard"

    def command(folder: Path) -> list[str]:
        words = [*flags.split(), *evaluated.split(), "--load", str(folder)]
        return training(folder, LAUNCHER, *words)

    straight, killed, log = tmp_path / "straight", tmp_path / "killed", tmp_path / "log"
    starts = killed / "starts.jsonl"
    with job(command(straight), log) as process:
        assert process.wait(600) == 0, log.read_text()
    for number in range(10):
        with job(command(killed), log) as process:
            if number % 5:  # else while it starts
                started = len(starts.read_text().splitlines()) if starts.exists() else 0
                wait_for(partial(_has_lines, starts, started + 1), process, log)
            time.sleep(moments.uniform(0, 3))
            family = psutil.Process(process.pid).children(recursive=True)
            for victim in _victims(process, number) if process.poll() is None else []:
                with contextlib.suppress(psutil.NoSuchProcess):
                    victim.kill()
            assert process.wait(60) is not None
            _, alive = psutil.wait_procs(family, timeout=10)
            assert not alive
    with job(command(killed), log) as process:
        assert process.wait(600) == 0, log.read_text()
    assert metrics(killed) == metrics(straight)
    evaluations = [(path / "validation.jsonl").read_text() for path in (straight, killed)]
    assert evaluations[0] == evaluations[1] != ""
    one, other = (tensors(path / "step_0000040", states=True) for path in (straight, killed))
    assert_identical(one, other)
