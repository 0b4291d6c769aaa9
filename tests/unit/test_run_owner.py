"""One owner of a run folder: claims, dead and live owners, heartbeats, earlier lives of a job."""

import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from moetron.common import run_owner
from moetron.common.errors import RunError, UserError
from moetron.common.run_owner import FILE, Ownership, claim, refuse_owned


@pytest.fixture(autouse=True)
def _no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


@pytest.fixture
def sleeper() -> Iterator[int]:
    """Return the id of another live process of this host."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process.pid
        process.kill()


def write(folder: Path, age_s: float = 0.0, **changes: Any) -> None:
    """Write an owner that differs from this process in ``changes``."""
    tree = {**vars(run_owner.this_process()), **changes}
    (folder / FILE).write_text(json.dumps(tree))
    os.utime(folder / FILE, (time.time() - age_s,) * 2)


def test_a_claim_names_this_process_and_is_released(tmp_path: Path) -> None:
    ownership = claim(tmp_path)
    tree = json.loads((tmp_path / FILE).read_text())
    assert tree["pid"] == os.getpid()
    assert set(tree) == {
        *("host", "pid", "pid_namespace", "process_start", "job_id", "claimed_at", "token", "at")
    }
    ownership.require()
    ownership.release()
    assert list(tmp_path.iterdir()) == []
    refuse_owned(tmp_path)


def test_heartbeats_write_news(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_owner, "HEARTBEAT_S", 0.02)
    steps = iter(range(10**9))
    ownership = claim(tmp_path, lambda: {"step": next(steps)})
    deadline = time.monotonic() + 20
    while json.loads((tmp_path / FILE).read_text())["step"] < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    ownership.release()
    time.sleep(0.1)
    assert list(tmp_path.iterdir()) == []


def test_a_live_process_of_this_host_is_refused_and_named(tmp_path: Path, sleeper: int) -> None:
    """However old its heartbeat is: it may be stopped by a debugger."""
    start = run_owner._process_start(sleeper)
    write(tmp_path, 9999.0, pid=sleeper, process_start=start, job_id="71")
    for refuse in (claim, refuse_owned):
        with pytest.raises(UserError, match=rf"process {sleeper} on .*, job 71, since 20.*9999 s"):
            refuse(tmp_path)


@pytest.mark.parametrize("how", ["gone", "another start", "before a boot"])
def test_a_dead_process_of_this_host_is_taken_over(
    tmp_path: Path, sleeper: int, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    boot, ticks = str(run_owner._process_start(sleeper)).split("/")
    start = {"gone": f"{boot}/{ticks}", "another start": f"{boot}/1", "before a boot": f"x/{ticks}"}
    pid = 2**22 + 1 if how == "gone" else sleeper
    write(tmp_path, pid=pid, process_start=start[how])
    claim(tmp_path).release()
    assert f"taken over from process {pid}" in caplog.text


def test_a_zombie_is_dead() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        while run_owner._process_start(process.pid) is not None:
            time.sleep(0.01)
        assert process.returncode is None


@pytest.mark.parametrize("elsewhere", [{"host": "b7"}, {"pid_namespace": "pid:[1]"}])
def test_an_owner_elsewhere_lives_as_long_as_its_heartbeat(
    tmp_path: Path, elsewhere: dict[str, str]
) -> None:
    write(tmp_path, run_owner.STALE_S - 20, **elsewhere)
    with pytest.raises(UserError, match="has not ended"):
        claim(tmp_path)
    write(tmp_path, run_owner.STALE_S + 5, **elsewhere)
    claim(tmp_path).release()


@pytest.mark.parametrize("text", ["", "{}", "[1]", "\x00", '{"pid": -1}'])
def test_a_file_that_names_nobody_is_no_owner(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    claim(tmp_path).release()


def test_one_of_several_claims_at_the_same_moment_succeeds(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib; from moetron.common.run_owner import claim\n"
        "print('ready', flush=True); input()\n"
        "try: claim(pathlib.Path(sys.argv[1])); print('mine', flush=True)\n"
        "except ValueError: print('refused', flush=True)\n"
        "input()"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(6)]
    try:
        assert all(process.stdout.readline() == "ready\n" for process in processes)
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        said = sorted(process.stdout.readline() for process in processes)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert said == ["mine\n", *["refused\n"] * 5]


def test_the_heartbeat_renews_and_survives_a_bad_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(run_owner, "HEARTBEAT_S", 0.01)
    ownership = claim(tmp_path)
    failures = threading.Event()
    renew = os.utime

    def full(path: Path) -> None:
        failures.set()
        raise OSError(errno.EIO, "store down")

    monkeypatch.setattr(run_owner.os, "utime", full)
    assert failures.wait(10)
    monkeypatch.setattr(run_owner.os, "utime", renew)
    write_old = (time.time() - 500,) * 2
    renew(tmp_path / FILE, write_old)
    deadline = time.monotonic() + 10
    while time.time() - (tmp_path / FILE).stat().st_mtime > 100 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert time.time() - (tmp_path / FILE).stat().st_mtime < 100
    ownership.require()
    ownership.release()
    assert "no heartbeat: [Errno 5] store down" in caplog.text


def test_an_owner_that_was_taken_over_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_owner, "HEARTBEAT_S", 0.01)
    ownership = claim(tmp_path)
    write(tmp_path, host="b7")
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            ownership.require()
        except RunError as error:
            assert f"taken over by process {os.getpid()} on b7" in str(error)
            break
        time.sleep(0.01)
    else:
        pytest.fail("the loss was not noticed")
    ownership.release()
    assert (tmp_path / FILE).exists()  # the other's


def test_a_requeued_job_waits_for_its_earlier_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "71")
    monkeypatch.setattr(run_owner, "_POLL_S", 0.01)
    write(tmp_path, host="b7", job_id="71")
    refuse_owned(tmp_path)  # a launcher's check leaves the wait to the run
    with ThreadPoolExecutor(1) as pool:
        claimed = pool.submit(claim, tmp_path)
        time.sleep(0.1)
        assert not claimed.done()
        (tmp_path / FILE).unlink()
        ownership: Ownership = claimed.result(10)
    ownership.release()
    assert "waiting for process" in caplog.text


def test_a_requeued_job_does_not_wait_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "71")
    monkeypatch.setattr(run_owner, "STALE_S", 0.3)
    monkeypatch.setattr(run_owner, "HEARTBEAT_S", 0.0)
    write(tmp_path, -1000.0, host="b7", job_id="71")  # its heartbeat stays young
    with pytest.raises(UserError, match="job 71"):
        claim(tmp_path)
