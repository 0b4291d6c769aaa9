"""Exit codes, the cause as the last line, and stop signals."""

import errno
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from moetron.common import process as resilience
from moetron.common import stop_signal
from moetron.common.errors import RunError, UserError
from moetron.common.process import run_guarded
from moetron.common.stop_signal import INTERRUPTS, StopSignal


def _raising(error: BaseException) -> int:
    raise error


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("code", [0, 75])
def test_a_code_passes_through(code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_guarded(lambda: code) == code
    assert capsys.readouterr() == ("", "")


def test_a_user_error_is_its_message_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_guarded(lambda: _raising(UserError("--tp 3: no\nuse 2"))) == 2
    assert capsys.readouterr() == ("", "--tp 3: no\nuse 2\n")


@pytest.mark.parametrize("error", [UserError("no"), RunError("the loss is nan")])
@pytest.mark.parametrize(
    ("rank", "local_rank", "waits"), [("0", "0", 0.0), ("8", "0", 1.0), ("1", "1", 2.0)]
)
def test_one_rank_of_a_node_prints_what_all_ranks_know(
    monkeypatch: pytest.MonkeyPatch, error: Exception, rank: str, local_rank: str, waits: float
) -> None:
    """Launchers end the ranks of a node when the first one ends."""
    slept: list[float] = []
    monkeypatch.setattr(resilience.time, "sleep", slept.append)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert run_guarded(lambda: _raising(error)) == (2 if isinstance(error, UserError) else 1)
    assert sum(slept) == waits * resilience.YIELD_S


def test_anything_else_ends_with_rank_and_cause(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert run_guarded(lambda: _raising(ArithmeticError("seven\n times eight"))) == 1
    error = capsys.readouterr().err
    assert error.count("Traceback") == 1
    assert error.splitlines()[-1] == "rank 3: ArithmeticError: seven times eight"
    report = json.loads((tmp_path / "error.json").read_text())["message"]
    assert report["message"] == "rank 3: ArithmeticError: seven times eight"
    assert int(report["extraInfo"]["timestamp"]) > 0


@pytest.mark.parametrize("error", [RunError("loss is nan"), OSError(errno.ENOSPC, "disk full")])
def test_a_self_explanatory_error_has_no_traceback(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_guarded(lambda: _raising(error)) == 1
    assert capsys.readouterr().err == f"rank 0: {type(error).__name__}: {error}\n"


def test_a_closed_reader_gets_no_traceback() -> None:
    endless = (
        "import sys\nfrom moetron.common.process import run_guarded\n"
        "def main():\n  while True: print('line')\nsys.exit(run_guarded(main))"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", endless], text=True, **pipes) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == "stopped: the reader of standard output closed it\n"
        assert process.wait(60) == 1


def test_a_broken_pipe_of_another_kind_keeps_its_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_guarded(lambda: _raising(BrokenPipeError(errno.EPIPE, "worker gone"))) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_stop_names_a_checkpoint_only_if_there_is_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert resilience.report_stop("runs/a") == 75
    assert "saved in runs/a; resume with --load runs/a" in capsys.readouterr().err
    assert resilience.report_stop(None) == 1
    assert "nothing is saved" in capsys.readouterr().err


def test_an_echo_waits_for_the_cause_and_has_no_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(resilience.time, "sleep", waits.append)
    echo = RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:9")
    assert run_guarded(lambda: _raising(echo)) == 1
    assert waits == [resilience.YIELD_S]
    error = capsys.readouterr().err
    assert error.startswith("rank 0: another rank ended: RuntimeError: ")
    assert error.count("\n") == 1


def test_an_interrupt_before_training_is_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_guarded(lambda: _raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_help_and_other_exits_pass_through() -> None:
    with pytest.raises(SystemExit):
        run_guarded(lambda: _raising(SystemExit(0)))


@pytest.mark.parametrize("number", stop_signal.STOP_SIGNALS)
def test_a_signal_requests_a_stop(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop()
        os.kill(os.getpid(), number)  # at once: the same request
        assert stop()
    assert signal.getsignal(number) == before
    assert capfd.readouterr().err.startswith(f"{number.name}: stopping after this step")


def test_a_second_signal_can_interrupt(capfd: pytest.CaptureFixture[str]) -> None:
    with StopSignal("chunk", INTERRUPTS, interrupt=True) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert capfd.readouterr().err.startswith("SIGINT: stopping after this chunk")


def test_other_threads_leave_signals_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)

    def enter() -> bool:
        with StopSignal() as stop:
            return stop() or signal.getsignal(signal.SIGTERM) != before

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(enter).result() is False


def test_a_second_signal_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop_signal, "REPEAT_S", -1.0)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        with StopSignal():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
