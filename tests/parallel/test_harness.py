"""The harness: results in rank order, an error when a rank fails, dies or hangs."""

import os
import time

import pytest
import torch

from tests.parallel.support.harness import RankFailed, run_ranks


def _sum_of_ranks(offset: int) -> torch.Tensor:
    value = torch.tensor(float(torch.distributed.get_rank() + offset))
    torch.distributed.all_reduce(value)
    return value * 10 + torch.distributed.get_rank()


def _fail_on_last_rank(how: str) -> None:
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        if how == "raise":
            raise ArithmeticError("seven times eight")
        if how == "die":
            os._exit(7)
        time.sleep(60)
    if how != "hang":
        torch.distributed.barrier()


def test_results_come_back_in_rank_order() -> None:
    assert [float(x) for x in run_ranks(_sum_of_ranks, 3, 1)] == [60.0, 61.0, 62.0]


@pytest.mark.parametrize(
    ("how", "message"),
    [("raise", "seven times eight"), ("die", r"exit code 7"), ("hang", r"ranks \[.*1\] still")],
)
def test_a_failing_rank_is_reported(how: str, message: str) -> None:
    start = time.monotonic()
    timeout_s = 4.0 if how == "hang" else 60.0
    with pytest.raises(RankFailed, match=message):
        run_ranks(_fail_on_last_rank, 2, how, timeout_s=timeout_s)
    assert time.monotonic() - start < 40
