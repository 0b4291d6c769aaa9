"""How a run ends: exit codes, one readable cause, no rank left waiting, and stopping by signal.

Under torchrun a rank that ends takes the others with it. What torchrun itself does:

- it passes SIGTERM, SIGINT, SIGHUP and SIGQUIT on to the ranks (``--signals-to-handle`` adds
  SIGUSR1), and kills what is still there after 30 s (``TORCH_ELASTIC_SHUTDOWN_TIMEOUT`` in
  seconds: give it the time that a step and a save take);
- whatever code a rank ends with, torchrun's own is 1, after a traceback of its own; the rank's code
  and cause stand in its closing table.
"""

import errno
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from moetron.common.errors import RunError, UserError
from moetron.common.threads import use_passive_waits

TRAIN = ("-m", "moetron", "train")
"""Words after a Python interpreter that train, wherever the package is."""
EXIT_FAILED = 1
EXIT_USER = 2
EXIT_STOPPED = 75
"""Stopped by a signal after a save: sysexits.h's EX_TEMPFAIL, "try again later"."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
REPEAT_S = 2.0
"""A second signal sooner than this is the same wish: a launcher may pass on what a rank got
itself."""
YIELD_S = 3.0
"""How long a rank that is not the cause waits for torchrun to end it before it speaks."""
_STDOUT = 1
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)
"""What a disk or a file system has to answer for, wherever it is met."""
_PEER_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Socket closed",
    "remote process exited",
    "NCCL communicator was aborted",
)


def run_guarded(main: Callable[[], int]) -> int:
    """Run ``main`` and return its exit code, or say once what went wrong and return that.

    A ``UserError`` is its message alone and code 2, a ``RunError`` or a disk's failure its message
    and code 1. Anything else is a traceback, a last line with rank and cause, and code 1. Where
    several ranks fail together, one of a node speaks: ranks other than 0 that meet a user's error,
    and ranks whose neighbour vanished, wait first; torchrun ends them.

    Idle OpenMP threads sleep from here on: torch must not be imported before.

    A rank that fails inside a job of several leaves by ``os._exit``, without waiting for process
    groups: its connections close, so that ranks that wait for it fail instead of hanging.
    """
    rank = int(os.environ.get("RANK", "0"))
    use_passive_waits()  # every command starts here, before torch is imported
    try:
        code = main()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        code, text = 128 + signal.SIGINT, "interrupted"
    except UserError as error:
        if rank != 0:  # rank 0 has met it too and speaks; on other nodes the first rank does
            first_of_node = os.environ.get("LOCAL_RANK", "0") == "0"
            time.sleep(YIELD_S if first_of_node else 2 * YIELD_S)
        code, text = EXIT_USER, str(error)
        _tell_torchrun(text)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            text = "stopped: nobody reads standard output any more"
        elif _is_echo(error):
            time.sleep(YIELD_S)
            text = f"rank {rank}: another rank ended: {_one_line(error)}"
        else:
            if not _needs_no_traceback(error):
                traceback.print_exc()
            text = f"rank {rank}: {_one_line(error)}"
            _tell_torchrun(text)
        code = EXIT_FAILED
    print(text, file=sys.stderr)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def stopped(save: str | None) -> int:
    """Say what a signal left behind in ``save``; the exit code."""
    kept = save is not None
    text = f"saved in {save}; --load {save} goes on" if kept else "nothing is kept: no --save"
    text = f"stopped by a signal; {text}"
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)
    _tell_torchrun(text)
    return EXIT_STOPPED if kept else EXIT_FAILED


class StopSignal:
    """Turns SIGTERM, SIGINT and SIGUSR1 into a wish to stop at the next step boundary.

    Inside ``with StopSignal() as stop``, ``stop()`` says whether a signal came to this rank; the
    ranks agree by reducing it with the step's figures, since a signal may reach only some of them,
    or some of them one step earlier. A second signal has its usual effect at once.
    """

    def __init__(self) -> None:
        self._since: float | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __call__(self) -> bool:
        """Whether this rank was asked to stop."""
        return self._since is not None

    def __enter__(self) -> "StopSignal":
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._since is None:
            self._since = time.monotonic()
            if os.environ.get("RANK", "0") == "0":
                name = signal.Signals(number).name
                text = f"{name}: stopping after this step (a second signal stops at once)\n"
                os.write(sys.stderr.fileno(), text.encode())
        elif time.monotonic() - self._since > REPEAT_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


def _needs_no_traceback(error: Exception) -> bool:
    """Whether an error's own words say all."""
    return isinstance(error, RunError) or (isinstance(error, OSError) and error.errno in _DISK)


def _reader_is_gone() -> bool:
    """Whether standard output is a pipe that was closed (``| head``); it leads nowhere then."""
    poller = select.poll()
    poller.register(_STDOUT, select.POLLOUT)
    gone = any(event & select.POLLERR for _, event in poller.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), _STDOUT)  # the interpreter flushes it at its end
    return gone


def _is_echo(error: Exception) -> bool:
    """Whether an error only says that another rank is gone."""
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _PEER_GONE)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _tell_torchrun(text: str) -> None:
    """Leave the cause where torchrun looks for it, so that its closing table ends with it."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return
    extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
    tree = {"message": {"message": text, "extraInfo": extra}}
    Path(path).write_text(json.dumps(tree), encoding="utf-8")
