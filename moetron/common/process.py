"""End of a process: exit codes, one readable cause, no rank left waiting.

Under torchrun, a rank that ends takes the others with it. torchrun itself

- forwards SIGTERM, SIGINT, SIGHUP and SIGQUIT to the ranks (``--signals-to-handle`` adds SIGUSR1)
  and kills ranks that are alive after 30 s (``TORCH_ELASTIC_SHUTDOWN_TIMEOUT`` in seconds: allow
  for a step and a save);
- exits with code 1 after a traceback of its own, whatever the rank's code; its closing table has
  the rank's code and cause.
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

from moetron.common.errors import RunError, UserError
from moetron.common.parent_death import end_with_launcher
from moetron.common.threads import use_passive_waits

TRAIN = ("-m", "moetron", "train")
"""Arguments of a Python interpreter that start training, wherever the package is."""
EXIT_FAILED = 1
EXIT_USER = 2
EXIT_STOPPED = 75
"""Stopped by a signal after a save: EX_TEMPFAIL of sysexits.h, "try again later"."""
EXIT_RERUN = (16, 17)
"""Ended after a rerun of a step: Megatron's codes (moe/health/rerun.py)."""
EXIT_HUNG = 76
"""Ended by the watchdog: a rank hangs, or is stopped, or its host is down."""
YIELD_S = 3.0
"""Wait of a rank that is not the cause before it prints: torchrun ends it meanwhile."""
_STDOUT = 1
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)
"""Errors of a disk or a file system, wherever they occur."""
_PEER_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Socket closed",
    "remote process exited",
    "NCCL communicator was aborted",
)


def run_guarded(main: Callable[[], int]) -> int:
    """Run ``main`` and return its exit code; print one cause if it fails.

    A ``UserError`` prints its message only, code 2; a ``RunError`` its message, its own code; a
    disk error its message, code 1. Any other exception prints a traceback and a last line with rank
    and cause, code 1. If several ranks fail together, one rank of a node prints: ranks other than 0
    with a UserError or a RunError, which mostly all of them have, and ranks that lost a peer, wait
    first, and the launcher ends them.

    Makes idle OpenMP threads sleep: torch must not be imported before. A rank ends with its
    launcher from here on.

    A rank that fails in a job of several exits by ``os._exit``, without waiting for process groups:
    its connections close, so that ranks that wait for it fail instead of hanging.
    """
    rank = int(os.environ.get("RANK", "0"))
    end_with_launcher()
    use_passive_waits()
    try:
        code = main()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        code, text = 128 + signal.SIGINT, "interrupted"
    except UserError as error:
        _leave_to_rank_0()
        code, text = EXIT_USER, str(error)
        report_to_torchrun(text)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            text = "stopped: the reader of standard output closed it"
        elif _is_echo(error):
            time.sleep(YIELD_S)
            text = f"rank {rank}: another rank ended: {_one_line(error)}"
        else:
            if isinstance(error, RunError):
                _leave_to_rank_0()
            if not _needs_no_traceback(error):
                traceback.print_exc()
            text = f"rank {rank}: {_one_line(error)}"
            report_to_torchrun(text)
        code = error.exit_code if isinstance(error, RunError) else EXIT_FAILED
    print(text, file=sys.stderr)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _leave_to_rank_0() -> None:
    """Wait while rank 0 prints what all ranks know; on other nodes the first rank prints it."""
    if os.environ.get("RANK", "0") != "0":
        first_of_node = os.environ.get("LOCAL_RANK", "0") == "0"
        time.sleep(YIELD_S if first_of_node else 2 * YIELD_S)


def report_stop(save: str | None) -> int:
    """Print what was saved after a signal; return the exit code."""
    kept = save is not None
    text = f"saved in {save}; resume with --load {save}" if kept else "nothing is saved: no --save"
    text = f"stopped by a signal; {text}"
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)
    report_to_torchrun(text)
    return EXIT_STOPPED if kept else EXIT_FAILED


def _needs_no_traceback(error: Exception) -> bool:
    """Return whether an error's message is enough."""
    return isinstance(error, RunError) or (isinstance(error, OSError) and error.errno in _DISK)


def _reader_is_gone() -> bool:
    """Return whether standard output is a closed pipe (``| head``); redirect it to /dev/null."""
    poller = select.poll()
    poller.register(_STDOUT, select.POLLOUT)
    gone = any(event & select.POLLERR for _, event in poller.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), _STDOUT)  # flushed at exit
    return gone


def _is_echo(error: Exception) -> bool:
    """Return whether an error only reports that a peer is gone."""
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _PEER_GONE)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def report_to_torchrun(text: str) -> None:
    """Write the cause to torchrun's error file; its closing table shows it."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return
    extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
    tree = {"message": {"message": text, "extraInfo": extra}}
    Path(path).write_text(json.dumps(tree), encoding="utf-8")
