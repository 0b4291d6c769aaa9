"""Synchronous CPU replacements of CUDA streams, events and random states."""

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


class HostEvent:
    """Event that is complete when recorded."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._at_s = 0.0

    def record(self, stream: Any = None) -> None:
        """Record the time; all earlier work is complete."""
        self._at_s = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """Always done."""
        return True

    def elapsed_time(self, end: "HostEvent") -> float:
        """Return the milliseconds from this event to ``end``."""
        return (end._at_s - self._at_s) * 1e3


class HostStream:
    """Stream that runs work at once."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """Ignore device and priority."""

    def wait_stream(self, stream: "HostStream") -> None:
        """Nothing to wait for."""

    def wait_event(self, event: HostEvent) -> None:
        """Nothing to wait for."""

    def record_event(self, event: HostEvent | None = None) -> HostEvent:
        """Record and return an event, by default a new one."""
        event = event or HostEvent()
        event.record(self)
        return event

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """Always done."""
        return True


MAIN_STREAM = HostStream()


def main_stream(device: Any = None) -> HostStream:
    """Return the main stream, which differs from every created stream."""
    return MAIN_STREAM


def on_stream(stream: Any) -> AbstractContextManager[None]:
    """Return a null context in place of one that selects a stream."""
    return nullcontext()


def synchronize(device: Any = None) -> None:
    """Nothing to wait for."""


def get_rng_state(
    device: Any = None, clone: bool = False, graph_safe: bool = False
) -> torch.Tensor:
    """Return the state (uint8) of the CPU's generator."""
    return torch.get_rng_state()


def set_rng_state(new_state: torch.Tensor, device: Any = None, graph_safe: bool = False) -> None:
    """Set the state of the CPU's generator."""
    torch.set_rng_state(new_state)


def manual_seed(seed: int) -> None:
    """Seed only the CPU's generator."""
    torch.default_generator.manual_seed(seed)
