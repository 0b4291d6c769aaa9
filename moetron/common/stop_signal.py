"""Stop at a boundary where no work is lost, on a signal; at once where there is nothing to lose."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_STDERR = 2
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
INTERRUPTS = (signal.SIGINT, signal.SIGTERM)
REPEAT_S = 2.0
"""A second signal sooner than this is a copy of the first: a launcher may forward what the rank
received itself."""


class EndAtOnce:
    """End the process on a signal with one line, inside ``with EndAtOnce() as early``.

    For the time in which a run starts: the exit code is 128 + signal, and nothing prints a
    traceback. Python runs handlers on the main thread only between its own instructions, and that
    thread may wait for other ranks in C++ for minutes. Here the signal writes its number to a pipe,
    from which a thread reads. Once a `StopSignal` was entered, the first signal is its own, and
    only a second one ends the process here, even if the main thread hangs.

    On other threads than the main one this does nothing.
    """

    def __init__(self) -> None:
        self.cleanups: list[Callable[[], None]] = []
        """Called before the end, from another thread."""
        self._previous: dict[signal.Signals, Any] = {}
        self._read, self._write = -1, -1

    def __enter__(self) -> "EndAtOnce":
        if threading.current_thread() is threading.main_thread():
            StopSignal.begun = False
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            threading.Thread(target=self._watch, args=(self._read,), daemon=True).start()
            self._previous = {number: signal.signal(number, _nothing) for number in STOP_SIGNALS}
            signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        return self

    def __exit__(self, *error: object) -> None:
        if self._previous:
            signal.set_wakeup_fd(-1)
            for number, handler in self._previous.items():
                signal.signal(number, handler)
            os.close(self._write)  # ends the thread

    def _watch(self, read: int) -> None:
        first_s: float | None = None  # time of the signal that StopSignal takes as a request
        while number := os.read(read, 1):
            if number[0] not in STOP_SIGNALS:
                continue
            now_s = time.monotonic()
            if first_s is None and StopSignal.begun:
                first_s = now_s
            elif first_s is None or now_s - first_s > REPEAT_S:
                when = "before the first step" if first_s is None else "at once"
                self._end(signal.Signals(number[0]), when)
        os.close(read)

    def _end(self, number: signal.Signals, when: str) -> None:
        for cleanup in self.cleanups:
            cleanup()
        _say(f"stopped by {number.name} {when}\n")
        os._exit(128 + number)


def _nothing(number: int, frame: FrameType | None) -> None:
    """Handle a signal whose number goes to the pipe."""


def _say(text: str) -> None:
    """Print from a handler or another thread, on rank 0."""
    if os.environ.get("RANK", "0") == "0":
        os.write(_STDERR, text.encode())


class StopSignal:
    """Records signals as a request to stop, inside ``with StopSignal() as stop``.

    ``stop()`` returns whether a signal came to this process. Ranks agree by reducing it with the
    step's metrics, since a signal may reach only some of them, or some of them a step earlier. A
    second signal stops at once: by its default action, or as a KeyboardInterrupt.

    Python handles signals on the main thread only: on other threads nothing changes.

    Args:
        unit: work that is completed first, for the message.
        signals: what to record.
        interrupt: whether a second signal, however soon, raises KeyboardInterrupt.
    """

    begun = False
    """Whether one was entered since the last `EndAtOnce`."""

    def __init__(
        self,
        unit: str = "step",
        signals: tuple[signal.Signals, ...] = STOP_SIGNALS,
        interrupt: bool = False,
    ) -> None:
        self._unit, self._signals, self._interrupt = unit, signals, interrupt
        self._since: float | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __call__(self) -> bool:
        """Return whether this process was asked to stop."""
        return self._since is not None

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            StopSignal.begun = True
            for number in self._signals:
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._since is None:
            self._since = time.monotonic()
            name = signal.Signals(number).name
            _say(f"{name}: stopping after this {self._unit} (a second signal stops at once)\n")
        elif self._interrupt:
            raise KeyboardInterrupt
        elif time.monotonic() - self._since > REPEAT_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


@contextmanager
def held_back() -> Iterator[None]:
    """Hold back stop signals from this thread, and from processes started in the block for good."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_group() -> None:
    """Make this helper process immune to stop signals: its parent decides when it ends.

    Terminals and torchrun signal the whole process group, systemd and SLURM (with
    proctrack/linuxproc) every process of a job, and the parent needs its helpers to complete its
    work. Of the signals that were held back when this process started, none takes effect. A helper
    ends when its parent tells it to, and gets killed when its parent ends (parent_death.py).
    """
    os.setpgid(0, 0)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # discards a pending one
    # For good, since torch's loader gives its workers a handler of SIGTERM that ends them.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
