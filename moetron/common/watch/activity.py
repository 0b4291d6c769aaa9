"""What the main thread of this process is doing, and since when, for threads that watch it."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

START, STEP, END = "start-up", "step", "shut-down"
_PARTS = ("evaluation", "save", "load")
_DECAY = 0.9
"""Of the longest step, with every step: one slow step does not count for good."""


@dataclass(frozen=True)
class Activity:
    """One thing at a time."""

    name: str
    """``START``, ``STEP``, ``END`` or a part of them: evaluation, save, load."""
    step: int
    """Step that is running, or the last one that ended; 0: none yet."""
    number: int
    """Counts the activities of this process."""
    since_s: float
    """Of ``time.monotonic``."""
    longest_step_s: float | None
    """Seconds of the longest recent step; None until the first one of this process ended, which
    also compiles and starts loader workers."""


_current = Activity(START, 0, 0, time.monotonic(), None)


def current() -> Activity:
    """Return what the main thread is doing."""
    return _current


def begin(name: str, step: int) -> None:
    """Record that the main thread begins something; costs a microsecond."""
    global _current  # of the process's one main thread
    before, now_s = _current, time.monotonic()
    longest_s = before.longest_step_s
    if name == START:
        longest_s = None
    elif before.name == STEP and step > before.step:  # one has ended
        longest_s = 0.0 if longest_s is None else max(now_s - before.since_s, _DECAY * longest_s)
    _current = Activity(name, step, before.number + 1, now_s, longest_s)


@contextmanager
def doing(name: str) -> Iterator[None]:
    """Record a part for the block or the decorated function; then restore the part before.

    A part of a part counts as the outer one; threads other than the main one record nothing.
    """
    before = _current
    if before.name in _PARTS or threading.current_thread() is not threading.main_thread():
        yield
        return
    begin(name, before.step)
    try:
        yield
    finally:
        begin(before.name, before.step)
