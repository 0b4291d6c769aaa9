"""Run one command in this process and judge how it ended; run many in a child process."""

import contextlib
import io
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

from moetron.__main__ import COMMANDS
from moetron.common.errors import UserError

LIMIT_S = 5.0
"""Processor time that a case may take."""
ENDLESS_S, HANG_S = 40, 240
"""Processor time and time after which a case is interrupted."""
MEMORY_BYTES = 4 << 30
"""Address space that all cases of a process may use beyond what it has at its start."""


@dataclass(frozen=True)
class Outcome:
    """End of one command."""

    code: int
    message: str
    """What it said on standard error."""
    fault: str | None
    """Why the end is not a good one: a traceback, no message, too slow; None: it is one."""
    seconds: float
    """Of processor time."""


class _Hung(BaseException):
    """The command did not end; no handler of Exception catches it."""


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise _Hung


def run(words: Sequence[str], entry: Callable[[], int] | None = None) -> Outcome:
    """Run a command of ``moetron`` as its process would and judge the end.

    Args:
        words: the command and its arguments.
        entry: the function to call in place of the command's ``main``.
    """
    output, errors = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, list(words)
    handlers = {
        number: signal.signal(number, _interrupt) for number in (signal.SIGALRM, signal.SIGPROF)
    }
    signal.alarm(HANG_S)
    signal.setitimer(signal.ITIMER_PROF, ENDLESS_S)
    start_s, fault = time.process_time(), None
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            code, said, fault = _end(entry or import_module(COMMANDS[words[0]][0]).main)
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        sys.argv = before
    seconds, message = time.process_time() - start_s, errors.getvalue() + said
    if fault is None and code == 2 and not message.strip():
        fault = "exit code 2 without a message"
    if fault is None and code not in (0, 2):
        fault = f"exit code {code}: {message[-500:]}"
    if fault is None and "Traceback" in message:
        fault = f"prints a traceback: {message[-1500:]}"
    if fault is None and seconds > LIMIT_S:
        fault = f"took {seconds:.1f} s"
    return Outcome(code, message, fault, seconds)


def _end(main: Callable[[], int]) -> tuple[int, str, str | None]:
    """Return (exit code, message, fault) of a command's function."""
    try:
        return main(), "", None
    except UserError as error:
        return 2, str(error), None
    except SystemExit as error:
        return (error.code if isinstance(error.code, int) else 1), "", None
    except _Hung:
        return 1, "", f"did not end: {traceback.format_exc(limit=-6)}"
    except BaseException:
        return 1, "", traceback.format_exc(limit=-8)


def in_child(cases: Sequence[Callable[[], Outcome]], together: int = 1 << 30) -> list[Outcome]:
    """Run cases in forked processes, one after the other; a death is a fault of its case.

    ``together``: cases of a process. Models leave threads behind, which fill its memory.
    """
    found: list[Outcome] = []
    while len(found) < len(cases):
        found += list(_some_in_child(cases[len(found) : len(found) + together]))
    return found


def _some_in_child(cases: Sequence[Callable[[], Outcome]]) -> Iterator[Outcome]:
    """Yield the outcomes of cases up to the first that ends its process."""
    reader, writer = Pipe(duplex=False)
    child = os.fork()
    if child == 0:
        reader.close()
        _serve(cases, writer)
    writer.close()
    count = 0
    with reader, contextlib.suppress(EOFError):
        while reader.poll(HANG_S + 30):
            yield Outcome(**json.loads(reader.recv_bytes()))
            count += 1
    os.kill(child, signal.SIGKILL)  # it has ended, or a C library of it hangs
    _, status = os.waitpid(child, 0)
    if count < len(cases):
        yield Outcome(1, "", f"ends its process: status {os.waitstatus_to_exitcode(status)}", 0.0)


def _serve(cases: Sequence[Callable[[], Outcome]], writer: Connection) -> None:
    """Write the outcome of each case to a pipe and end this process."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        if "FUZZ_SHOW" not in os.environ:
            os.dup2(null, 1)  # C libraries write there
            os.dup2(null, 2)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for case in cases:
            try:
                outcome: Any = asdict(case())
            except Exception:
                outcome = asdict(Outcome(1, "", f"no case: {traceback.format_exc()}", 0.0))
            writer.send_bytes(json.dumps(outcome).encode())
    finally:
        os._exit(0)
