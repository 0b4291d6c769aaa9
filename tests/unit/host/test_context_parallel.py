"""Chunks of context-parallel ranks, against megatron-core's batches."""

import inspect

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.utils import get_batch_on_this_cp_rank

from moetron.moe.host.context_parallel import (
    chunks_of_rank,
    from_rank_order,
    gather_sequence,
    own_chunks,
)
from tests.parallel.support.harness import model_parallel, run_ranks
from tests.unit.training.host_reads import HostReads


def test_two_ranks() -> None:
    assert [chunks_of_rank(rank, 2) for rank in range(2)] == [(0, 3), (1, 2)]
    assert from_rank_order(2) == [0, 2, 3, 1]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_order_inverts_the_sharding(ranks: int) -> None:
    held = [chunk for rank in range(ranks) for chunk in chunks_of_rank(rank, ranks)]
    assert [held[place] for place in from_rank_order(ranks)] == list(range(2 * ranks))


def _options() -> dict[str, bool]:
    """Return what megatron-core 0.19 also asks for."""
    hybrid = "is_hybrid_cp" in inspect.signature(get_batch_on_this_cp_rank).parameters
    return {"is_hybrid_cp": False} if hybrid else {}


def _gather() -> tuple[torch.Tensor, torch.Tensor]:
    positions = torch.arange(12.0).view(1, 12)
    with model_parallel(context_parallel_size=2):
        group = parallel_state.get_context_parallel_group()
        own = own_chunks(positions, 1, group)
        theirs = get_batch_on_this_cp_rank({"x": positions}, cp_group=group, **_options())["x"]
        assert torch.equal(own, theirs)
        local = own.view(6, 1).requires_grad_()
        gather_sequence(local.detach(), group)
        with HostReads() as reads:  # from the second call on
            sequence = gather_sequence(local, group)
        assert not reads.found
        (sequence * positions.view(12, 1) * (group.rank() + 1)).sum().backward()
    assert local.grad is not None
    return sequence.detach().view(12), torch.stack([local.detach(), local.grad]).view(2, 6)


def test_gather_sums_gradients_of_all_ranks() -> None:
    for sequence, (local, gradient) in run_ranks(_gather, 2):
        assert sequence.tolist() == list(range(12))
        assert torch.equal(gradient, 3 * local)
