"""Measurement of one training program: wall time, device time, synchronisations, memory, profile.

On a CPU only wall time and loss are measured.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any, Protocol

import torch
from torch.profiler import ProfilerActivity, profile

from tests.bench.gpu.kernel_kinds import (
    Kernel,
    busy_ms,
    by_kind,
    kernels_of,
    longest_gaps,
    table_of,
)
from tests.bench.gpu.sync_counter import counted_syncs

GIB = 2**30
LONGEST_STEP_S = 3.0
"""On a GPU: emulation, for example, would use up the time of the variants after it."""


class Program(Protocol):
    """A model with its optimizer."""

    parameters: int

    def step(self) -> None:
        """Enqueue one optimizer step; may return before the device has run it."""
        ...

    def loss(self) -> float:
        """Return the cross-entropy of the last step, nats a token."""
        ...


@dataclass(frozen=True)
class Plan:
    """Steps of a measurement, in this order; then one more whose synchronisations are counted."""

    warm_up: int = 3
    timed: int = 8
    profiled: int = 2

    @property
    def steps(self) -> int:
        """Return the number of all steps."""
        return self.warm_up + self.timed + self.profiled + 1


@dataclass
class Measured:
    """Result; None: not measured on this device."""

    step_ms: float
    """Median wall time of a step."""
    all_steps_ms: list[float]
    loss: float
    """Of the last timed step."""
    parameters: int
    device_ms: float | None = None
    """Time of a step in which at least one kernel, copy or fill ran on the device."""
    kernel_sum_ms: float | None = None
    """Sum of their durations: more than ``device_ms`` where streams overlap."""
    kernels: int | None = None
    """Kernels, copies and fills of a step."""
    kinds_ms: dict[str, float] = field(default_factory=dict)
    gaps: list[str] = field(default_factory=list)
    """Longest times without a kernel in the profiled steps."""
    syncs: int | None = None
    """Calls of a step that block the host until the device is done."""
    sync_sites: dict[str, int] = field(default_factory=dict)
    peak_gib: float | None = None
    """Highest memory in tensors, construction included."""
    reserved_gib: float | None = None
    """Highest memory that torch's allocator held."""

    @property
    def wall_over_device(self) -> float | None:
        """Return wall over device time, or None."""
        return None if self.device_ms is None else self.step_ms / self.device_ms


def measure(program: Program, plan: Plan, profile_path: Any = None) -> Measured:
    """Run and measure the steps of ``plan``; ``profile_path``: also write a detailed profile."""
    for _ in range(plan.warm_up - 1):
        program.step()
    (seconds,) = step_times(program, 1)
    if torch.cuda.is_available() and seconds > LONGEST_STEP_S:
        raise RuntimeError(f"a step takes {seconds:.1f} s: too slow for this bench")
    times = [seconds * 1e3 for seconds in step_times(program, plan.timed)]
    found = Measured(median(times), times, program.loss(), program.parameters)
    if torch.cuda.is_available():
        found.peak_gib = torch.cuda.max_memory_allocated() / GIB
        found.reserved_gib = torch.cuda.max_memory_reserved() / GIB
    _profile(program, plan.profiled, found)
    with counted_syncs() as sites:
        program.step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        found.syncs, found.sync_sites = sum(sites.values()), dict(sites.most_common())
    if profile_path is not None:
        write_profile(program, plan.profiled, profile_path)
    return found


def step_times(program: Program, count: int) -> list[float]:
    """Return the seconds of ``count`` steps.

    On a GPU from the end of the step before on the device, without waiting for it: a program whose
    host runs ahead is not held back.
    """
    if not torch.cuda.is_available():
        ends = [time.perf_counter()]
        for _ in range(count):
            program.step()
            ends.append(time.perf_counter())
        return [after - before for before, after in pairwise(ends)]
    torch.cuda.synchronize()
    events = [_event()]
    for _ in range(count):
        program.step()
        events.append(_event())
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in pairwise(events)]


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


@contextmanager
def _profiler(host: bool) -> Iterator[Any]:
    """Profile CUDA, and the host too if asked: that slows the host, but no kernel."""
    activities = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    if host or not activities:
        activities.append(ProfilerActivity.CPU)
    with profile(activities=activities) as profiler:
        yield profiler
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def _profile(program: Program, steps: int, found: Measured) -> None:
    if not torch.cuda.is_available():
        return
    with _profiler(host=False) as profiler:
        for _ in range(steps):
            program.step()
    kernels: list[Kernel] = kernels_of(profiler)
    found.device_ms = busy_ms(kernels) / steps
    found.gaps = longest_gaps(kernels, rows=12)
    found.kernel_sum_ms = sum(kernel.ms for kernel in kernels) / steps
    found.kernels = round(len(kernels) / steps)
    found.kinds_ms = {kind: ms / steps for kind, ms in by_kind(kernels).items()}


def write_profile(program: Program, steps: int, path: Any) -> None:
    """Write the kernels by device time, by kind, and the host's operations by their own time."""
    with _profiler(host=True) as profiler:
        for _ in range(steps):
            program.step()
    host = profiler.key_averages().table(
        sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=70
    )
    text = table_of(kernels_of(profiler), steps, rows=40)
    text += f"\nHost operations of {steps} steps by their own time\n{host}\n"
    path.write_text(text, encoding="utf-8")
