"""Where ranks are, and which of them hold up a job that hangs."""

import linecache
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from moetron.common.watch.activity import STEP, Activity

_PACKAGE = Path(__file__).resolve().parents[2]
_COLLECTIVES = "distributed_c10d.py"
_WRAPPERS = ("wrapper", "_coalescing_manager")
_SKIPPED = ("/torch/", "typing_extensions.py", "contextlib.py")
"""In file names: between a collective and who calls it."""


@dataclass(frozen=True)
class Status:
    """Sign of life of a rank."""

    beat: int
    """Grows with every sign."""
    name: str
    step: int
    number: int
    """As in `Activity`."""
    age_s: float
    """Seconds since this activity began."""
    place: str
    """Innermost line of ours that the main thread is in, and the collective if it waits in one."""
    waits: bool
    """Whether that is a wait for other ranks."""

    def text(self) -> str:
        """Return activity and place."""
        verb = "waits in" if self.waits else "is at"
        return f"{activity_text(self.name, self.step)}, {verb} {self.place}"


def activity_text(name: str, step: int) -> str:
    """Return ``step 12``, ``the save after step 12``, ``start-up``."""
    if name == STEP:
        return f"step {step}"
    return f"the {name} after step {step}" if step else name


def status_of(activity: Activity, beat: int, now_s: float) -> Status:
    """Return the sign of life of this process."""
    place, waits = place_of(sys._current_frames().get(threading.main_thread().ident or 0))
    age_s = round(now_s - activity.since_s, 1)
    return Status(beat, activity.name, activity.step, activity.number, age_s, place, waits)


def place_of(frame: FrameType | None) -> tuple[str, bool]:
    """Return the innermost line of our package, and whether the thread waits for other ranks.

    The innermost Python function may be a collective of torch.distributed, which waits in C++, or
    a line that calls ``wait``.
    """
    collective, innermost, caller, ours = "", frame, None, None
    while frame is not None and ours is None:
        code = frame.f_code
        if code.co_filename.endswith(_COLLECTIVES) and code.co_name not in _WRAPPERS:
            collective = code.co_name  # the outermost is the one that was called
        if caller is None and not any(part in code.co_filename for part in _SKIPPED):
            caller = frame
        if Path(code.co_filename).is_relative_to(_PACKAGE):
            ours = frame
        frame = frame.f_back
    if innermost is None:
        return "an unknown place", False
    line = linecache.getline(innermost.f_code.co_filename, innermost.f_lineno)
    if not collective and ".wait(" in line and "distributed" in _module(innermost):
        collective = "a wait for a collective"
    shown = dict.fromkeys([caller or innermost, ours or caller or innermost])
    at = " below ".join(map(_line, shown))
    return (f"{collective} of {at}", True) if collective else (at, False)


def _line(frame: FrameType) -> str:
    """Return file, line and function, without the folders of the installation."""
    path = frame.f_code.co_filename
    for start in (f"{_PACKAGE}/", "site-packages/"):
        path = path.rpartition(start)[2]
    return f"{path}:{frame.f_lineno} ({frame.f_code.co_name})"


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def culprits(found: Mapping[int, Status], frozen: Sequence[int]) -> list[int]:
    """Return the ranks that hold up the others: [] if all of them wait in the same place.

    In this order: ranks without a sign of life; ranks in an earlier activity; ranks that wait for
    nobody while others do; ranks that are not where most of them are.
    """
    if frozen:
        return list(frozen)
    first = min(status.number for status in found.values())
    late = [rank for rank, status in found.items() if status.number == first]
    if len(late) < len(found):
        return late
    busy = [rank for rank, status in found.items() if not status.waits]
    if busy and (len(busy) < len(found) or len(found) == 1):
        return busy
    places = [status.place for status in found.values()]
    usual = max(places, key=places.count)
    if 2 * places.count(usual) > len(places):
        return [rank for rank, status in found.items() if status.place != usual]
    return []


def guilty_ranks(
    found: Mapping[int, Status], absent: Sequence[int], frozen: Sequence[int]
) -> list[int]:
    """Return the ranks that `describe` names as the cause, in order; arguments are its."""
    return sorted([*absent, *culprits(found, frozen)]) if found else sorted(absent)


def describe(found: Mapping[int, Status], absent: Sequence[int], frozen: Sequence[int]) -> str:
    """Return one line for each group of ranks with the same state, and last the cause.

    Args:
        found: last sign of life of each rank that has given one.
        absent: ranks that never gave one.
        frozen: ranks of ``found`` that give none any more.
    """
    groups: dict[str, list[int]] = {}
    for rank, status in sorted(found.items()):
        text = status.text()
        if rank in frozen:
            text = f"no sign of life; last in {text}"
        groups.setdefault(text, []).append(rank)
    if absent:
        groups.setdefault("never started to train", []).extend(absent)
    lines = [f"  {ranks_text(ranks)}: {text}" for text, ranks in groups.items()]
    return "\n".join([*lines, _cause(found, absent, frozen)])


def _cause(found: Mapping[int, Status], absent: Sequence[int], frozen: Sequence[int]) -> str:
    guilty = guilty_ranks(found, absent, frozen)
    if not guilty:
        return "all ranks wait for each other: the network, or collectives that do not match"
    waiting = {status.place for rank, status in found.items() if rank not in guilty}
    others = f"; the others wait in {min(waiting)}" if len(waiting) == 1 else ""
    if set(guilty) <= {*frozen, *absent}:
        last = [found[rank] for rank in guilty if rank in found]
        when = f" in {activity_text(last[0].name, last[0].step)}" if last else ""
        return (
            f"{ranks_text(guilty)} gave no sign of life{when} (stopped, or its host is down)"
            f"{others}"
        )
    return f"{ranks_text(guilty)} hangs in {found[guilty[0]].text()}{others}"


def ranks_text(ranks: Sequence[int]) -> str:
    """Return ``rank 3`` or ``ranks 0-2, 5``."""
    parts: list[list[int]] = []
    for rank in sorted(ranks):
        if parts and rank == parts[-1][-1] + 1:
            parts[-1].append(rank)
        else:
            parts.append([rank])
    text = ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
    return f"rank {text}" if len(ranks) == 1 else f"ranks {text}"
