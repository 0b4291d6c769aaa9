"""Ranks that are stopped or hang: the watchdog names them and ends the job, or waits on."""

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from moetron.moe.health.events import read_events
from tests.e2e.test_kill import LAUNCHER, TORCHRUN, end_of, job, training, wait_for

BOUNDS = (
    "--watchdog-seconds",
    "4",
    "--watchdog-startup-seconds",
    "90",
    "--save-interval",
    "100000",
)
FOUND_S = 30.0
"""Bound, longest step, comparison of signs and end of the ranks, on busy cores."""


def stopped(folder: Path, launcher: list[str], victim: int, *more: str) -> tuple[int, str, float]:
    """Stop a rank after some steps; return exit code, output and seconds until the job ended."""
    log, run_folder = folder / "log", folder / "run"
    with job(training(run_folder, launcher, *BOUNDS, *more), log) as process:
        wait_for(lambda: "step 4/" in log.read_text(), process, log)
        ranks = psutil.Process(process.pid).children()
        time.sleep(1.5)  # for a sign of life
        ranks[victim].send_signal(signal.SIGSTOP)
        since = time.monotonic()
        code, _ = end_of(process, log, 90)  # torchrun gives ranks 30 s to end
        return code, log.read_text(), time.monotonic() - since


def test_a_stopped_rank_0_is_named_and_the_job_ends(tmp_path: Path) -> None:
    code, output, seconds = stopped(tmp_path, LAUNCHER, 0)
    assert code == 76 and seconds < FOUND_S, output
    last = output.splitlines()[-1]
    assert last.startswith("watchdog: rank 0, which holds the job's store, gave no sign of life")
    assert "in step " in last and "rank 1 waits in all_" in last
    assert list(tmp_path.glob("run/hang/step_*/stacks_rank_1.txt"))
    event = list(read_events(tmp_path / "run" / "events.jsonl"))[-1]
    assert (event["kind"], event["action"], event["ranks"]) == ("hang", "stop", [0])
    assert event["text"] in last and event["step"] >= 4


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "code", "victim"), [(LAUNCHER, 76, 1), (TORCHRUN, 1, 0)])
def test_a_stopped_rank_is_named(
    tmp_path: Path, launcher: list[str], code: int, victim: int
) -> None:
    found, output, _ = stopped(tmp_path, launcher, victim)
    assert found == code
    cause = [line for line in output.splitlines() if line.startswith("watchdog: rank")][-1]
    assert f"rank {victim} gave no sign of life in step" in cause
    assert "the others wait in all_" in cause
    assert f"  rank {victim}: no sign of life; last in step" in output


def test_a_rank_that_goes_on_is_waited_for(tmp_path: Path) -> None:
    log, run_folder = tmp_path / "log", tmp_path / "run"
    more = ("--watchdog-action", "warn", "--train-iters", "100000")
    with job(training(run_folder, LAUNCHER, *BOUNDS, *more), log) as process:
        wait_for(lambda: "step 4/" in log.read_text(), process, log)
        victim = psutil.Process(process.pid).children()[1]
        victim.suspend()
        wait_for(lambda: "; waiting on" in log.read_text(), process, log)
        victim.resume()
        wait_for(lambda: "continues in step" in log.read_text(), process, log)
        process.send_signal(signal.SIGTERM)
        code, lines = end_of(process, log)
    assert code == 75, lines
    [event] = [row for row in read_events(run_folder / "events.jsonl") if row["kind"] == "hang"]
    assert (event["action"], event["ranks"]) == ("warn", [1])
    assert "rank 1 gave no sign of life" in log.read_text()


HANGING = """
    import os, sys, time
    sys.path.insert(0, {root!r})
    import pretrain_moe
    from moetron.common.process import run_guarded

    def main():
        from moetron.moe.training import loop
        whole = loop.Loop.batches
        def batches(self):
            for read in whole(self):
                yield slow(read)
        def slow(read):
            for number, batch in enumerate(read):
                if os.environ["RANK"] == "1" and number == 12:
                    time.sleep(1000)
                yield batch
        loop.Loop.batches = lambda self: list(batches(self))
        return pretrain_moe.main()

    if __name__ == "__main__":
        sys.exit(run_guarded(main))
"""


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_with_its_line(tmp_path: Path) -> None:
    root, log, script = Path(__file__).resolve().parents[2], tmp_path / "log", tmp_path / "hang.py"
    script.write_text(textwrap.dedent(HANGING.format(root=str(root))))
    command = training(tmp_path / "run", LAUNCHER, *BOUNDS)
    command[len(LAUNCHER)] = str(script)
    with job(command, log) as process:
        code, lines = end_of(process, log, 120)
    assert code == 76, lines
    assert lines[-1].startswith("watchdog: rank 1 hangs in step 7, is at "), lines
    assert "hang.py" in lines[-1] and "the others wait in all_" in lines[-1]
    assert len(list((tmp_path / "run" / "hang" / "step_7").iterdir())) == 2


SUSPENDED = """
    import os, subprocess, sys, time
    from moetron.common.watch import activity
    from moetron.moe.monitoring import watchdog
    from tests.parallel.support.checkpoint_runs import settings

    dog = watchdog.Watchdog(settings("dp", watch={"watchdog_seconds": 4}), 0, 1)
    activity.begin(activity.STEP, 1)
    activity.begin(activity.STEP, 2)
    time.sleep(float(sys.argv[1]))
    pid = os.getpid()
    subprocess.Popen(["sh", "-c", f"kill -STOP {pid}; sleep 8; kill -CONT {pid}"]).wait()
    activity.begin(activity.STEP, 3)
    dog.close()
"""


@pytest.mark.parametrize(("awake_s", "code"), [(0, 0), (20, 76)])
def test_time_in_which_a_process_is_suspended_does_not_count(awake_s: int, code: int) -> None:
    """As after Ctrl-Z and fg; a hang of the same length is found."""
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(SUSPENDED), str(awake_s)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    assert ("watchdog: rank 0 hangs in step 2" in done.stderr) == (code == 76)
