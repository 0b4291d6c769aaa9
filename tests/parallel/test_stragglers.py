"""A slow rank is named by its own time, which leaves out its waits for others."""

import time

import pytest
import torch

from moetron.moe.monitoring.stragglers import Stragglers, report
from tests.parallel.support.checkpoint_runs import settings
from tests.parallel.support.harness import run_ranks


def test_report() -> None:
    assert report([0.1, 0.1, 0.1, 0.152], 1.3).startswith("STRAGGLER: rank 3 1.52x (above")
    assert report([0.1, 0.102], 1.3) == (
        "computing without waits: median rank 100.0 ms a step, slowest rank 1 1.02x"
    )


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
        found.append(measured.after_step(time.perf_counter() - start_s))
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
