"""Stand-ins for CUDA streams, events and random states on a host, where work is done when asked."""

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


class HostEvent:
    """A point in time: on a host, whatever was recorded before is already done."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._at_s = 0.0

    def record(self, stream: Any = None) -> None:
        """Take the time; all earlier work is done."""
        self._at_s = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """Always done."""
        return True

    def elapsed_time(self, end: "HostEvent") -> float:
        """Milliseconds from this event to ``end``."""
        return (end._at_s - self._at_s) * 1e3


class HostStream:
    """An order of work; a host has one order, so that all streams agree."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """Take and ignore a device and a priority."""

    def wait_stream(self, stream: "HostStream") -> None:
        """Nothing to wait for."""

    def wait_event(self, event: HostEvent) -> None:
        """Nothing to wait for."""

    def record_event(self, event: HostEvent | None = None) -> HostEvent:
        """The event (a new one unless given), recorded now."""
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
    """The stream that work runs on: never equal to a stream that someone made."""
    return MAIN_STREAM


def on_stream(stream: Any) -> AbstractContextManager[None]:
    """Context that "runs on" a stream."""
    return nullcontext()


def synchronize(device: Any = None) -> None:
    """Nothing to wait for."""


def get_rng_state(
    device: Any = None, clone: bool = False, graph_safe: bool = False
) -> torch.Tensor:
    """The state (uint8) of the host's generator, which draws for tensors on the host."""
    return torch.get_rng_state()


def set_rng_state(new_state: torch.Tensor, device: Any = None, graph_safe: bool = False) -> None:
    """Set the state of the host's generator."""
    torch.set_rng_state(new_state)


def manual_seed(seed: int) -> None:
    """Seed the host's generator alone."""
    torch.default_generator.manual_seed(seed)
