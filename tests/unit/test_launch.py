"""Our launcher: environment of ranks, exit codes, signals, failures, and no rank left behind."""

import os
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from moetron.commands import launch
from moetron.common.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
HEAD = """
    import os, sys, time
    from pathlib import Path
    from moetron.common.process import run_guarded
    from moetron.common.stop_signal import EndAtOnce, StopSignal
    rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
"""
TRAINS = """
    def main():
        with EndAtOnce(), StopSignal() as stop:
            (folder / f"ready{rank}").touch()
            while not stop():
                time.sleep(0.01)
            return 75
    sys.exit(run_guarded(main))
"""
STARTS = """
    def main():
        with EndAtOnce():
            (folder / f"ready{rank}").touch()
            time.sleep(60)
    sys.exit(run_guarded(main))
"""
YOUNG = """
    (folder / f"ready{rank}").touch()
    time.sleep(60)
"""


def script(folder: Path, body: str) -> list[str]:
    """Return the command that launches two ranks of a program without torch."""
    path = folder / "program.py"
    path.write_text(textwrap.dedent(HEAD) + textwrap.dedent(body))
    launcher = (str(ROOT / "tools" / "launch.py"), "--nproc-per-node", "2")
    return [sys.executable, *launcher, str(path), str(folder)]


@contextmanager
def launched(folder: Path, body: str) -> Iterator[subprocess.Popen[str]]:
    """Launch two ranks and wait until both are ready."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment = {**inherited, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = script(folder, body)
    with subprocess.Popen(command, env=environment, text=True, **pipes) as process:  # type: ignore[call-overload]
        try:
            deadline = time.monotonic() + 60
            while not all((folder / f"ready{rank}").exists() for rank in range(2)):
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.01)
            yield process
        finally:
            process.kill()


def end_of(process: subprocess.Popen[str], limit_s: float = 30.0) -> tuple[int, str]:
    """Return the exit code and what was printed; no rank may be left."""
    ranks = psutil.Process(process.pid).children()
    _, errors = process.communicate(timeout=limit_s)
    assert not any(rank.is_running() for rank in ranks)
    assert "Traceback" not in errors
    return process.returncode, errors


def forwarded(number: signal.Signals) -> signal.Signals:
    """Return what ranks get: Ctrl-C is a SIGTERM for them."""
    return signal.SIGTERM if number == signal.SIGINT else number


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_reach_ranks_and_their_code_comes_back(
    tmp_path: Path, number: signal.Signals
) -> None:
    with launched(tmp_path, TRAINS) as process:
        process.send_signal(number)
        code, errors = end_of(process)
    assert code == 75
    sent = forwarded(number).name
    assert errors == f"{sent}: stopping after this step (a second signal stops at once)\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("body", [STARTS, YOUNG], ids=["importing", "starting Python"])
def test_a_signal_before_the_first_step_is_one_line(
    tmp_path: Path, number: signal.Signals, body: str
) -> None:
    with launched(tmp_path, body) as process:
        process.send_signal(number)
        code, errors = end_of(process)
    sent = forwarded(number)
    assert errors == f"stopped by {sent.name} before the first step\n"
    assert code == 128 + sent


def test_ranks_end_with_a_killed_launcher(tmp_path: Path) -> None:
    with launched(tmp_path, TRAINS) as process:
        ranks = psutil.Process(process.pid).children()
        assert len(ranks) == 2
        process.kill()
        _, alive = psutil.wait_procs(ranks, timeout=10)
        assert not alive


def test_a_rank_that_starts_after_its_launcher_ended_ends(tmp_path: Path) -> None:
    command = [*script(tmp_path, TRAINS)[-2:]]
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    environment = {**os.environ, "MOETRON_LAUNCHER_PID": str(gone.pid), "RANK": "0"}
    done = subprocess.run(
        [sys.executable, *command], env={**environment, "PYTHONPATH": str(ROOT)}, timeout=60
    )
    assert done.returncode == 137


FAILS = """
    (folder / f"ready{rank}").touch()
    if rank == 1:
        while not (folder / "ready0").exists():
            time.sleep(0.01)
        end()
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("end", "code", "line"),
    [
        ("sys.exit(3)", 3, "launch: rank 1 failed with exit code 3\n"),
        ("sys.exit(2)", 2, ""),
        (
            "os.kill(os.getpid(), 9)",
            137,
            "launch: rank 1 was killed by SIGKILL (by hand, or for lack of memory)\n",
        ),
    ],
)
def test_a_rank_that_fails_ends_the_others(tmp_path: Path, end: str, code: int, line: str) -> None:
    with launched(tmp_path, FAILS.replace("end()", end)) as process:
        assert end_of(process) == (code, line)


def test_ranks_that_do_not_end_are_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launch.SHUTDOWN_S, "0.2")
    body = TRAINS.replace("not stop()", "True")
    with launched(tmp_path, body) as process:
        process.terminate()
        code, errors = end_of(process)
    assert code == 137
    assert errors.endswith("launch: killing ranks that did not end after 0.2 s\n")


@pytest.mark.parametrize(
    ("node", "ended", "code"),
    [(0, 75, 75), (1, 75, 0), (1, 16, 0), (1, 17, 0), (0, 17, 17), (1, 1, 1), (1, 76, 76)],
)
def test_of_several_nodes_the_first_answers_for_an_end_that_all_know_of(
    monkeypatch: pytest.MonkeyPatch, node: int, ended: int, code: int
) -> None:
    """SLURM (--kill-on-bad-exit) kills nodes that still write once another one returns 75."""
    waits: list[float] = []
    monkeypatch.setattr(launch.time, "sleep", waits.append)
    monkeypatch.setattr(launch, "run", lambda _: ended)
    words = f"launch --nnodes 2 --node-rank {node} --master-addr a --master-port 1 train"
    monkeypatch.setattr(launch.sys, "argv", words.split())
    assert launch.main() == code
    assert waits == ([launch.AGREED_S] if node == 0 else [])


def test_gloo_uses_the_interface_that_leads_to_the_first_node(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On Debian a host's name stands for 127.0.1.1: no other node reaches gloo there."""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    routes = {"first": None, "192.0.2.1": "10.0.0.1", "10.0.0.1": "10.0.0.2"}
    addresses = {"lo": "127.0.0.1", "ib0": "10.0.0.1", "eth0": "10.0.0.2"}
    known = {name: [SimpleNamespace(address=each)] for name, each in addresses.items()}
    monkeypatch.setattr(launch, "_address_towards", routes.__getitem__)
    monkeypatch.setattr(launch.psutil, "net_if_addrs", lambda: known)

    def chosen(words: str) -> str | None:
        arguments = launch.parse(f"{words} --master-port 1 train".split())
        return launch.environment_of(arguments).get("GLOO_SOCKET_IFNAME")

    assert chosen("--nnodes 2 --node-rank 0 --master-addr first") == "ib0"
    assert chosen("--nnodes 2 --node-rank 1 --master-addr 10.0.0.1") == "eth0"
    assert chosen("--nproc-per-node 2") == "lo"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth9")
    assert chosen("--nnodes 2 --node-rank 0 --master-addr first") == "eth9"


def test_the_way_to_this_host_is_no_address() -> None:
    assert launch._address_towards("127.0.0.1") is None
    assert launch._address_towards("no-such-host.invalid") is None


def test_one_of_several_nodes_of_a_job_may_train_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NODEID", "1")
    assert launch.parse(["train"]).node_rank == 0


def test_the_environment_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "SLURM_NODEID"):
        monkeypatch.delenv(name, raising=False)
    one = launch.parse(["--nproc-per-node", "2", "train", "--config", "x"])
    assert launch.command_of(one) == [sys.executable, "-m", "moetron", "train", "--config", "x"]
    own = launch.environment_of(one)
    assert (own["WORLD_SIZE"], own["MASTER_ADDR"]) == ("2", "127.0.0.1")
    assert 1024 < int(own["MASTER_PORT"]) < 65536
    monkeypatch.setenv("SLURM_NODEID", "1")
    words = "--nproc-per-node 4 --nnodes 3 --master-addr a1 --master-port 7 p.py -m s3://b"
    several = launch.parse(shlex.split(words))
    assert launch.command_of(several) == [sys.executable, "p.py", "-m", "s3://b"]
    own = launch.environment_of(several)
    names = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
    assert [own[name] for name in names] == ["12", "4", "1", "a1", "7"]


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--nproc-per-node 0 train",
        "--nnodes 2 --node-rank 2 --master-addr a --master-port 1 train",
        "--nnodes 2 train",
    ],
)
def test_mistakes_are_refused(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match=r"^launch: "):
        launch.parse(words.split())
