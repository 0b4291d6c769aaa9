"""End of a process with its parent: no rank and no loader worker outlives the one that started it.

A launcher that is killed with SIGKILL cannot end its ranks, which would keep memory, GPUs and the
port. Only processes that a launcher of ours or torchrun started are bound to it: a run that a shell
started continues when the shell ends.
"""

import atexit
import ctypes
import os
import signal
import sys
import threading
import time
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from typing import Any

from moetron.common.stop_signal import leave_group

LAUNCHER = "MOETRON_LAUNCHER_PID"
"""Environment variable with the process id of our launcher."""
TORCHRUN = "TORCHELASTIC_RUN_ID"
POLL_S = 2.0
_PR_SET_PDEATHSIG = 1


def end_with_launcher() -> None:
    """Get killed when the launcher of this rank ends; do nothing in a process without one.

    Must run on the main thread.
    """
    ours = os.environ.get(LAUNCHER)
    if ours is not None:
        launcher = int(ours)
        if os.getppid() == launcher:
            end_with_parent()
        is_orphan = os.getppid() != launcher and not exists(launcher)
    elif TORCHRUN in os.environ:
        end_with_parent()
        is_orphan = _is_adopted()
    else:
        return
    if is_orphan:  # the launcher ended before the request was made
        os._exit(128 + signal.SIGKILL)


def end_with_parent() -> None:
    """Get killed when the parent process ends; if it has ended already is for the caller to check.

    Linux sends the signal when the *thread* that started this process ends: launchers and loaders
    start processes from their main threads. Elsewhere a thread polls.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    else:
        threading.Thread(target=_poll, args=(os.getppid(),), daemon=True).start()


def exists(process: int) -> bool:
    """Return whether a process of this id is on this host, whoever owns it."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _poll(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_S)
    os._exit(128 + signal.SIGKILL)


def _is_adopted() -> bool:
    """Return whether the parent is the process that adopts orphans instead of a launcher.

    Orphans get process 1 or systemd as their parent; in a container, process 1 may be torchrun.
    """
    parent = os.getppid()
    try:
        command = Path(f"/proc/{parent}/cmdline").read_bytes()
    except OSError:  # not Linux, or ended just now
        return parent == 1
    return (parent == 1 or b"systemd" in command) and b"python" not in command


class _Bind:
    """Object that, unpickled in a process that this one starts, binds it to this one."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _begin_helper, (os.getpid(),)


class HelperProcess(SpawnProcess):
    """Process that ends with its parent, and not by stop signals.

    Both hold before it imports what its work needs, such as torch: what is unpickled first does it.
    """

    def terminate(self) -> None:
        """End it at once: torch's loader terminates workers that do not end when told to."""
        self.kill()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state, after what binds the new process."""
        return {"_bind": _Bind(), **self.__dict__}


class HelperContext(SpawnContext):
    """Context of `HelperProcess` for torch's loaders."""

    Process = HelperProcess  # type: ignore[assignment]


def _begin_helper(parent: int) -> None:
    leave_group()
    end_with_parent()
    if os.getppid() != parent:  # ended before
        os._exit(1)
    atexit.register(os._exit, 0)  # taking torch's modules down takes seconds
