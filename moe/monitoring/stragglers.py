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
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import ProcessGroup, Work

from moetron.moe.config.schema.settings import Settings
from moetron.moe.host.patching import Patch

_COLLECTIVES = (
    *("allreduce", "allreduce_coalesced", "broadcast", "reduce", "barrier", "send", "recv"),
    *("allgather", "_allgather_base", "allgather_into_tensor_coalesced", "alltoall"),
    *("reduce_scatter", "_reduce_scatter_base", "reduce_scatter_tensor_coalesced"),
    *("alltoall_base",),
)


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

    def after_step(self, step_time_s: float) -> str | None:
        """Count a step; every --log-straggler-interval steps return a line. Collective then."""
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
        return report(all_R.tolist(), self._ratio)

    def close(self) -> None:
        """Measure no more."""
        for patch in self._undo:
            patch.apply()
        self._undo = []

    def _waits_s(self) -> float:
        """Return the seconds inside collectives since the last call."""
        # The step has read its metrics on the host: all of its events are complete.
        waited_s = self._waited_s + sum(a.elapsed_time(b) for a, b in self._events) / 1e3
        self._waited_s, self._events = 0.0, []
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


def report(own_s: list[float], bound: float) -> str:
    """Return a line that compares the slowest ranks to the median one.

    The lower median, so that of two ranks the slower one is compared to the faster one.
    """
    median_s = statistics.median_low(own_s)
    ratios = {rank: seconds / median_s for rank, seconds in enumerate(own_s)}
    slowest = max(ratios, key=ratios.__getitem__)
    text = f"computing without waits: median rank {1e3 * median_s:.1f} ms a step"
    slow = sorted((r for r in ratios if ratios[r] > bound), key=lambda r: -ratios[r])
    if not slow:
        return f"{text}, slowest rank {slowest} {ratios[slowest]:.2f}x"
    named = ", ".join(f"rank {rank} {ratios[rank]:.2f}x" for rank in slow[:8])
    more = f" and {len(slow) - 8} more" if len(slow) > 8 else ""
    return f"STRAGGLER: {named}{more} (above --log-straggler-ratio {bound:g}); {text}"
