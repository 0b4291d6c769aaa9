"""Events of a run's health, as lines of ``SAVE/events.jsonl``."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from moetron.common.errors import RunError

FILE = "events.jsonl"
MACHINE_KINDS = frozenset(
    [
        *("hang", "straggler"),
        *("transient_error", "reproducible_result", "persistent_error", "correct_result"),
    ]
)
"""Kinds of events about the machine, which a resume does not repeat: their lines are kept."""
ROLLED_BACK_TO = "rolled_back_to"
"""Key of an event that set the run back: the step of the checkpoint."""


class NotFiniteError(RunError):
    """A loss or gradient norm is infinite or NaN."""


class SpikeError(RunError):
    """A loss or gradient norm is a spike, and the policy says stop."""


class ReplicasDifferError(RunError):
    """Data-parallel replicas of a parameter differ."""


@dataclass(frozen=True)
class Event:
    """One event."""

    step: int
    """Step in which it was found; the first is 1."""
    kind: str
    action: str
    """``none``, or what followed: warn, skip, stop, rollback."""
    text: str
    """In words, for the progress lines."""
    samples: tuple[int, int] | None = None
    """Sample numbers [first, end) of the step."""
    sources: list[str] = field(default_factory=list)
    """Sources of the step's samples, for a value that is not finite those with such a loss."""
    ranks: list[int] = field(default_factory=list)
    """Ranks that stand out; empty: all alike."""
    values: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    """Further keys of the line."""

    def rolled_back(self, step: int, next_sample: int, next_token: int, rollbacks: int) -> "Event":
        """Return the event with where its rollback led; a resume reads it."""
        extra = {
            ROLLED_BACK_TO: step,
            "next_sample": next_sample,
            "next_token": next_token,
            "rollbacks": rollbacks,
        }
        return replace(self, extra=extra)

    def row(self) -> dict[str, Any]:
        """Return the line; numbers that JSON lacks become text."""
        row = _json(asdict(self))
        extra = row.pop("extra")
        return {**row, **extra, "time": datetime.now(timezone.utc).isoformat(timespec="seconds")}


def append_event(folder: Path, event: Event) -> None:
    """Append an event to the file in ``folder``, from any process of the run.

    In one write to the end of the file, so that lines of several processes do not mix on a local
    file system. A line that a full disk cut is ended first.
    """
    line = json.dumps(event.row()) + "\n"
    file = os.open(folder / FILE, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(file).st_size
        cut = size and os.pread(file, 1, size - 1) != b"\n"
        os.write(file, ("\n" + line if cut else line).encode())
    finally:
        os.close(file)


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of an events file, none if it is missing, without those a crash cut."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            yield row


def _json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_json(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
