"""Watchdog of a rank: names the ranks that hold up a job that hangs, and ends it.

Each rank has two threads. One writes a sign of life to the job's store every second: activity,
step, and the line that the main thread is in. The other looks whether the main thread of its own
rank gets on. Every rank takes part in the collectives of every step, so all ranks hang when one
does, and any rank that can still run finds out: also if rank 0 is stopped, which usually holds the
store. Only then are the signs of all ranks read, by one of them; a sign that does not change in
two beats shows a rank that cannot run at all. The cost before is one small message a second.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch

from moetron.common.process import EXIT_HUNG, YIELD_S, report_to_torchrun
from moetron.common.watch import activity
from moetron.common.watch.activity import START, STEP, Activity
from moetron.moe.config.schema.settings import Settings
from moetron.moe.health.events import Event, append_event
from moetron.moe.monitoring.hang_report import (
    Status,
    activity_text,
    describe,
    guilty_ranks,
    status_of,
)

BEAT_S = 1.0
COMPARED_S = 2.5 * BEAT_S
"""Time between two looks at the signs of life."""
STORE_S = 8.0
"""Time for the store to answer."""
FILES_S = 5.0
"""Time to write stacks, or the event: the storage may be what hangs."""
OTHERS_S = 30.0
"""Time after which a rank ends by itself that left the report to another one."""
FOLDER = "hang"
_KEY = "moetron_watchdog"
_END = f"{_KEY}/end"

T = TypeVar("T")


class Watchdog:
    """Threads of this rank; `close` ends them."""

    def __init__(self, settings: Settings, rank: int, world_size: int) -> None:
        self._watch, self._save = settings.watch, settings.checkpoint.save
        self._rank, self._world_size = rank, world_size
        self._store: Any = None
        self._answered = False
        """Whether the store answered when it was asked for the signs of life."""
        self._ended = threading.Event()
        self._elapsed_s, self._warnings = 0.0, 0
        self._threads: list[threading.Thread] = []
        if self._watch.watchdog_seconds > 0:
            self._start(self._judge)

    def attach(self, store: Any) -> None:
        """Give signs of life through the job's store from here on."""
        if self._watch.watchdog_seconds > 0 and self._world_size > 1:
            # A connection of its own: the main thread may block the other one for minutes.
            self._store = store.clone()
            self._start(self._beat)

    def close(self) -> None:
        """End the threads."""
        self._ended.set()
        for thread in self._threads:
            thread.join(2 * BEAT_S)

    def bound_s(self, current: Activity) -> float:
        """Return the seconds that an activity may last."""
        if current.name == STEP and current.longest_step_s is not None:
            return self._watch.watchdog_seconds + current.longest_step_s
        if current.name in (START, STEP):
            return self._watch.watchdog_startup_seconds
        return self._watch.watchdog_save_seconds

    def _start(self, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=target, name="watchdog", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _beat(self) -> None:
        beat = 0
        with suppress(Exception):  # the job ends, and the store with it
            while not self._ended.wait(BEAT_S):
                if self._store.check([_END]):
                    return  # the store ends with its rank; torch would print a stack
                beat += 1
                mine = status_of(activity.current(), beat, time.monotonic())
                self._store.set(f"{_KEY}/{self._rank}", json.dumps(asdict(mine)))

    def _judge(self) -> None:
        """Measure by the time that this process could run: a whole suspended job may continue."""
        seen, before_s = activity.current(), time.monotonic()
        while not self._ended.wait(BEAT_S):
            now_s, current = time.monotonic(), activity.current()
            self._elapsed_s += min(now_s - before_s, 3 * BEAT_S)
            before_s = now_s
            if current.number != seen.number:
                if self._warnings:
                    _say(f"watchdog: rank {self._rank} continues in {_text(current)}")
                seen, self._elapsed_s, self._warnings = current, 0.0, 0
            # Warnings come at once, two, four ... times the bound.
            elif self._elapsed_s > self.bound_s(seen) * 2**self._warnings:
                self._overdue(seen)
                self._warnings += 1
                before_s = time.monotonic()

    def _overdue(self, seen: Activity) -> None:
        """Report what hangs, on one rank; end if told so."""
        stops = self._watch.watchdog_action == "stop"
        folder = None if self._save is None else Path(self._save) / FOLDER / f"step_{seen.step}"
        written = folder is not None and _limited(lambda: self._write(folder), FILES_S)
        found = self._report(seen)
        if activity.current().number != seen.number:
            return  # it continued meanwhile
        if found is None:  # another rank reports
            if stops:
                time.sleep(OTHERS_S)
                os._exit(EXIT_HUNG)
            return
        where = f"\n  stacks of all ranks: {folder}" if written else ""
        text, ranks = found
        head, _, cause = text.rpartition("\n")
        end = "; the job ends, the last checkpoint remains" if stops else "; waiting on"
        _say(f"{head}{where}\nwatchdog: {cause}{end}")
        self._tell(seen, cause, ranks)
        if stops:
            report_to_torchrun(f"watchdog: {cause}")
            if self._answered:
                _limited(self._announce_end, STORE_S)
            os._exit(EXIT_HUNG)

    def _announce_end(self) -> None:
        """Let all ranks end their signs of life before the store ends."""
        self._store.clone().set(_END, "")
        time.sleep(1.5 * BEAT_S)

    def _tell(self, seen: Activity, cause: str, ranks: list[int]) -> None:
        """Append an event to the run's file; the rank that writes the others may be what hangs."""
        if self._save is None:
            return
        values = {
            "activity": seen.name,
            "seconds": round(self._elapsed_s, 1),
            "bound_s": round(self.bound_s(seen), 1),
            "reported_by": self._rank,
        }
        event = Event(
            seen.step, "hang", self._watch.watchdog_action, cause, ranks=ranks, values=values
        )
        folder = Path(self._save)
        _limited(lambda: append_event(folder, event), FILES_S)

    def _report(self, seen: Activity) -> tuple[str, list[int]] | None:
        """Return the report, its last line the cause, and the ranks that are the cause.

        None on ranks that leave it to another.
        """
        bound_s = self.bound_s(seen)
        head = (
            f"watchdog: {_text(seen)} has not ended for {self._elapsed_s:.0f} s "
            f"(bound {bound_s:.1f} s)\n"
        )
        if self._store is None:
            mine = {self._rank: status_of(seen, 0, time.monotonic())}
            return head + describe(mine, [], []), [self._rank]
        key = f"{_KEY}/report/{seen.name}/{seen.step}/{self._warnings}"
        answer = _limited(lambda: [self._gather(key)], STORE_S + COMPARED_S)
        if answer is None:
            # No rank can ask the others: the first one here that can run reports.
            time.sleep(YIELD_S * int(os.environ.get("LOCAL_RANK", "0")))
            text, ranks = self._without_store(seen)
            return head + text, ranks
        self._answered = True
        [found] = answer
        return None if found is None else (head + found[0], found[1])

    def _gather(self, key: str) -> tuple[str, list[int]] | None:
        """Read the signs of life twice and describe them, on the first rank that asks for it."""
        store = self._store.clone()
        if store.add(key, 1) > 1:
            return None
        first = self._signs(store)
        time.sleep(COMPARED_S)
        second = self._signs(store)
        frozen = [rank for rank in second if first.get(rank) == second[rank]]
        absent = [rank for rank in range(self._world_size) if rank not in second]
        return describe(second, absent, frozen), guilty_ranks(second, absent, frozen)

    def _signs(self, store: Any) -> dict[int, Status]:
        keys = [f"{_KEY}/{rank}" for rank in range(self._world_size)]
        if not store.check(keys):  # some rank never gave one
            keys = [key for key in keys if store.check([key])]
        values = store.multi_get(keys) if keys else []
        ranks = [int(key.rpartition("/")[2]) for key in keys]
        return {r: Status(**json.loads(v)) for r, v in zip(ranks, values, strict=True)}

    def _without_store(self, seen: Activity) -> tuple[str, list[int]]:
        mine = status_of(seen, 0, time.monotonic())
        torchrun = bool(os.environ.get("TORCHELASTIC_USE_AGENT_STORE"))
        holder = "torchrun" if torchrun else "rank 0"
        text = (
            f"  rank {self._rank}: {mine.text()}\n"
            f"{holder}, which holds the job's store, gave no sign of life in {_text(seen)} "
            f"(stopped, or its host is down); rank {self._rank} waits in {mine.place}"
        )
        return text, [] if torchrun else [0]

    def _write(self, folder: Path | None) -> bool:
        """Write this rank's stacks, and the record of its last collectives if torch keeps one."""
        assert folder is not None
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"stacks_rank_{self._rank}.txt").open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file)
        dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)
        if dump is not None and torch.cuda.is_available():
            (folder / f"nccl_trace_rank_{self._rank}").write_bytes(dump())  # for torchfrtrace
        return True


def record_collectives() -> None:
    """Let NCCL's flight recorder keep the last collectives of this process, before it starts."""
    for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"):  # new, old
        os.environ.setdefault(name, "2000")


def _text(current: Activity) -> str:
    return activity_text(current.name, current.step)


def _limited(function: Callable[[], T], limit_s: float) -> T | None:
    """Return what ``function`` returns, or None if it fails or takes longer."""
    results: list[T] = []

    def run() -> None:
        with suppress(Exception):
            results.append(function())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit_s)
    return results[0] if results else None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
