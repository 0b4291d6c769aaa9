"""Slow ranks: the time that each rank computes, without its waits for others.

All ranks end a step together, whoever is slow; the others wait longer in collectives. So a rank's
own time is that of its steps less the time inside collectives. On a CPU a rank waits in
``Work.wait``, which torch's collectives call. On a GPU the host does not wait: events on the
current stream bracket each collective and each wait for one, so that its transfer counts as a
wait, too, about as long on every rank.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import ProcessGroup, Work

from moetron.moe.config.schema.settings import Settings
from moetron.moe.health.events import Event
from moetron.moe.host.patching import Patch

_COLLECTIVES = (
    *("allreduce", "allreduce_coalesced", "broadcast", "reduce", "barrier", "send", "recv"),
    *("allgather", "_allgather_base", "allgather_into_tensor_coalesced", "alltoall"),
    *("reduce_scatter", "_reduce_scatter_base", "reduce_scatter_tensor_coalesced"),
    *("alltoall_base",),
)


@dataclass(frozen=True)
class OwnTimes:
    """Seconds a step that each rank computes, by rank."""

    seconds: list[float]
    bound: float
    """Ratio to the median above which a rank is slow."""

    @property
    def median_s(self) -> float:
        """Return the lower median: of two ranks the slower is compared with the faster one."""
        return statistics.median_low(self.seconds)

    @property
    def slow(self) -> list[int]:
        """Return the slow ranks, slowest first."""
        limit_s = self.bound * self.median_s
        found = [rank for rank, own_s in enumerate(self.seconds) if own_s > limit_s]
        return sorted(found, key=lambda rank: -self.seconds[rank])

    def text(self) -> str:
        """Return a line that compares the slowest ranks with the median one."""
        median_s, slow = self.median_s, self.slow
        text = f"computing without waits: median rank {1e3 * median_s:.1f} ms a step"

        def named(rank: int) -> str:
            return f"rank {rank} {self.seconds[rank] / median_s:.2f}x"

        if not slow:
            slowest = max(range(len(self.seconds)), key=self.seconds.__getitem__)
            return f"{text}, slowest {named(slowest)}"
        more = f" and {len(slow) - 8} more" if len(slow) > 8 else ""
        ranks = ", ".join(map(named, slow[:8]))
        return f"STRAGGLER: {ranks}{more} (above --log-straggler-ratio {self.bound:g}); {text}"

    def event(self, step: int) -> Event:
        """Return the event of slow ranks."""
        values = {"own_seconds_a_step": self.seconds}
        return Event(step, "straggler", "warn", self.text(), ranks=self.slow, values=values)


class Stragglers:
    """Measures while it exists, with --log-straggler; `close` undoes that."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self._interval = settings.watch.log_straggler_interval
        self._ratio = settings.watch.log_straggler_ratio
        self._device = device
        self._steps, self._total_s, self._waited_s = 0, 0.0, 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._undo: list[Patch] = []
        if settings.watch.log_straggler and dist.get_world_size() > 1:
            names: list[tuple[type, str]] = [(Work, "wait")]
            if device.type == "cuda":
                names += [(ProcessGroup, name) for name in _COLLECTIVES]
            for owner, name in names:
                if hasattr(owner, name):
                    self._undo.append(Patch(owner, name, self._timed(getattr(owner, name))).apply())

    def after_step(self, step_time_s: float) -> OwnTimes | None:
        """Count a step; every --log-straggler-interval steps return all ranks' times.

        Collective then.
        """
        if not self._undo:
            return None
        self._steps += 1
        self._total_s += step_time_s
        if self._steps < self._interval:
            return None
        own_s = (self._total_s - self._waits_s()) / self._steps
        self._steps, self._total_s = 0, 0.0
        own_1 = torch.tensor([own_s], dtype=torch.float64, device=self._device)
        all_R = own_1.new_empty(dist.get_world_size())
        # All-gather over all ranks, once in the interval: each rank's own seconds a step.
        dist.all_gather_into_tensor(all_R, own_1)
        return OwnTimes(all_R.tolist(), self._ratio)

    def close(self) -> None:
        """Measure no more."""
        for patch in self._undo:
            patch.apply()
        self._undo = []

    def _waits_s(self) -> float:
        """Return the seconds inside collectives since the last call."""
        # The step has read its metrics on the host: its events are complete, but for those of the
        # update, which gathers parameters. Their time is unknown yet, and counts the next time.
        ended = [end.query() for _, end in self._events]
        pairs = list(zip(self._events, ended, strict=True))
        waited_s = self._waited_s + sum(a.elapsed_time(b) for (a, b), done in pairs if done) / 1e3
        self._waited_s, self._events = 0.0, [pair for pair, done in pairs if not done]
        return waited_s

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def on_cpu(*args: Any, **kwargs: Any) -> Any:
            start_s = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._waited_s += time.perf_counter() - start_s

        def on_gpu(*args: Any, **kwargs: Any) -> Any:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            try:
                return function(*args, **kwargs)
            finally:
                end.record()
                self._events.append((start, end))

        return on_cpu if self._device.type == "cpu" else on_gpu
