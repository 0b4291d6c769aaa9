"""A slow rank is named by its own time, which leaves out its waits for others."""

import time
from pathlib import Path

import pytest
import torch

from moetron.moe.health.events import read_events
from moetron.moe.monitoring.stragglers import OwnTimes, Stragglers
from tests.parallel.support.checkpoint_runs import parallel_of, settings, start
from tests.parallel.support.harness import run_ranks


def test_report() -> None:
    slow = OwnTimes([0.1, 0.14, 0.1, 0.152], 1.3)
    assert slow.text().startswith("STRAGGLER: rank 3 1.52x, rank 1 1.40x (above")
    event = slow.event(7)
    assert (event.step, event.kind, event.action, event.ranks) == (7, "straggler", "warn", [3, 1])
    alike = OwnTimes([0.1, 0.102], 1.3)
    assert not alike.slow
    assert alike.text() == (
        "computing without waits: median rank 100.0 ms a step, slowest rank 1 1.02x"
    )


class _Event:
    """Event of a GPU that is behind the host: it refuses to tell times before it is complete."""

    def __init__(self, at_ms: float, complete: bool = True) -> None:
        self.at_ms, self.complete = at_ms, complete

    def query(self) -> bool:
        return self.complete

    def elapsed_time(self, end: "_Event") -> float:
        if not (self.complete and end.complete):
            raise RuntimeError("Both events must be completed before calculating elapsed time.")
        return end.at_ms - self.at_ms


def test_waits_of_the_update_count_when_they_are_over() -> None:
    """The update gathers parameters after the step's only wait for the device."""
    measured = Stragglers(settings("dp"), torch.device("cpu"))
    end = _Event(9000.0, complete=False)
    measured._events = [(_Event(1000.0), _Event(3000.0)), (_Event(8500.0), end)]  # type: ignore[list-item]
    assert measured._waits_s() == 2.0
    end.complete = True
    assert measured._waits_s() == 0.5
    assert measured._waits_s() == 0.0


def _steps(slow: int) -> str:
    rank = torch.distributed.get_rank()
    watch = {"log_straggler": True, "log_straggler_interval": 5}
    measured = Stragglers(settings("dp", watch=watch), torch.device("cpu"))
    found: list[str | None] = []
    for _ in range(10):
        start_s = time.perf_counter()
        for part in range(2):
            time.sleep(0.03 if rank == slow else 0.01)
            value = torch.ones(1000)
            work = torch.distributed.all_reduce(value, async_op=part == 1)
            if work is not None:
                work.wait()
        times = measured.after_step(time.perf_counter() - start_s)
        found.append(None if times is None else times.text())
    wait = torch._C._distributed_c10d.Work.wait
    measured.close()
    assert torch._C._distributed_c10d.Work.wait is not wait
    assert [line is not None for line in found] == [False, False, False, False, True] * 2
    return str(found[-1])


@pytest.mark.parametrize("slow", [0, 2])
def test_the_slow_rank_is_named(slow: int) -> None:
    lines = run_ranks(_steps, 3, slow)
    assert len(set(lines)) == 1
    assert lines[0].startswith(f"STRAGGLER: rank {slow} "), lines
    assert "," not in lines[0].split(" (above")[0]


def _train_slowly(folder: str) -> None:
    chosen = settings(
        "dp",
        training={"train_iters": 4},
        checkpoint={"save": folder},
        watch={"log_straggler": True, "log_straggler_interval": 2, "log_straggler_ratio": 1.5},
    )
    with parallel_of(chosen):
        loop = start(chosen)

        def stop_requested() -> bool:
            if torch.distributed.get_rank() == 1 and loop.progress.step >= 2:
                time.sleep(2.0)
            return False

        loop.run(stop_requested)


def test_a_slow_rank_is_an_event_of_the_run(tmp_path: Path) -> None:
    run_ranks(_train_slowly, 2, str(tmp_path))
    event = list(read_events(tmp_path / "events.jsonl"))[-1]
    assert (event["step"], event["kind"], event["ranks"]) == (4, "straggler", [1])
    assert event["text"].startswith("STRAGGLER: rank 1 ")
