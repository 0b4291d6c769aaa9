"""Optimizer state of parameters that several ranks hold: how it travels, and where it is held."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from moetron.moe.checkpoint import optimizer_state
from moetron.moe.checkpoint.optimizer_state import Slot
from moetron.moe.checkpoint.states import parameter_span
from moetron.moe.checkpoint.states.parameter_span import Span, gathered

RANKS, SHARD = 3, 4


@pytest.fixture(params=range(RANKS))
def span(request) -> Iterator[Span]:
    """Yield each rank's span of 10 elements, which begin at the second of three shards of 4."""
    rank = request.param
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=RANKS)
    start, end = [(0, 3), (3, 7), (7, 10)][rank]
    yield Span(dist.group.WORLD, start, end, 0, 2, SHARD, 1)
    dist.destroy_process_group()


def test_parts_travel_in_batches_over_the_communicator_of_the_group(span, monkeypatch) -> None:
    """NCCL makes a communicator for each pair of ranks that `send` and `recv` are called on."""
    done: list[tuple[str, int, int]] = []

    def batch(operations: list[dist.P2POp]) -> list[dist.Work]:
        for each in operations:
            assert each.group is dist.group.WORLD
            done.append((each.op.__name__, each.group_peer, each.tensor.numel()))
            if each.op is dist.irecv:
                each.tensor.fill_(each.group_peer)
        return []

    monkeypatch.setattr(parameter_span.dist, "batch_isend_irecv", batch)
    monkeypatch.setattr(parameter_span.dist, "send", None)
    monkeypatch.setattr(parameter_span.dist, "recv", None)
    rank, count = span.group.rank(), span.end - span.start
    parts = [torch.full((count,), float(rank)), torch.full((count,), float(rank))]
    found = gathered(parts, span, torch.empty(2, 5))
    if rank > 0:
        assert (done, found) == ([("isend", 0, 2 * count)], [])
        return
    assert done == [("irecv", 1, 2 * 4), ("irecv", 2, 2 * 3)]
    expected = torch.tensor([0.0] * 3 + [1] * 4 + [2] * 3).view(2, 5)
    assert all(torch.equal(each, expected) for each in found) and len(found) == 2


def test_a_parameter_of_one_rank_is_not_copied() -> None:
    span = Span(None, 0, 10, 1, 1, 64, 0)  # type: ignore[arg-type]
    own = torch.arange(10.0)
    (found,) = gathered([own], span, torch.empty(2, 5))
    assert found.shape == (2, 5) and found.data_ptr() == own.data_ptr()


@pytest.mark.parametrize(("last_rank", "kind"), [(0, "meta"), (2, "cpu")])
def test_a_split_parameter_is_read_to_the_host(monkeypatch, last_rank: int, kind: str) -> None:
    """A device of one shard has no room for the full state of each parameter that it holds."""
    monkeypatch.setattr(optimizer_state.dist, "get_rank", lambda: 0)
    group = SimpleNamespace(rank=lambda: 0)
    entry = ShardedTensor.from_rank_offsets(
        "w", torch.empty(2, 5, device="meta"), replica_id=(0, 0, 0)
    )
    main = torch.empty(4, device="meta")
    slot = Slot(entry, main, {}, ("exp_avg",), Span(group, 0, 4, 0, last_rank, 4, 0), None)  # type: ignore[arg-type]
    monkeypatch.setattr(optimizer_state, "leaves", lambda _: [None])
    monkeypatch.setattr(optimizer_state, "_slots", lambda *_: [slot])
    request, _ = optimizer_state.load_request(None, {}, [])  # type: ignore[arg-type]
    devices = {key: each.data.device.type for key, each in request.items() if "step" not in key}
    assert set(devices.values()) == {kind} and len(devices) == 1
