"""Stop at a boundary where no work is lost, on a signal."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

_STDERR = 2
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
INTERRUPTS = (signal.SIGINT, signal.SIGTERM)
REPEAT_S = 2.0
"""A second signal sooner than this is a copy of the first: a launcher may forward what the rank
received itself."""


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
            for number in self._signals:
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._since is None:
            self._since = time.monotonic()
            if os.environ.get("RANK", "0") == "0":
                name = signal.Signals(number).name
                text = f"{name}: stopping after this {self._unit} (a second signal stops at once)\n"
                os.write(_STDERR, text.encode())
        elif self._interrupt:
            raise KeyboardInterrupt
        elif time.monotonic() - self._since > REPEAT_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
