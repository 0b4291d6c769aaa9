"""Arithmetic of flat shards."""

from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from moetron.moe.checkpoint import optimizer_state


def _spans(ranks: int, shard: int, bucket_start: int, start: int, end: int) -> list[Any]:
    bucket = SimpleNamespace(grad_data=torch.empty(ranks * shard), offset=bucket_start)
    return [
        optimizer_state._span(
            SimpleNamespace(
                data_parallel_group=SimpleNamespace(size=lambda: ranks, rank=lambda rank=rank: rank)
            ),
            bucket,
            bucket_start + start,
            bucket_start + end,
        )
        for rank in range(ranks)
    ]


@given(
    ranks=st.integers(1, 5),
    shard=st.integers(1, 6),
    bucket_start=st.integers(0, 9),
    data=st.data(),
)
def test_spans_split_a_parameter_at_shard_boundaries(
    ranks: int, shard: int, bucket_start: int, data: st.DataObject
) -> None:
    """Against an element-wise count: element i of the buffer belongs to rank i // shard."""
    start = data.draw(st.integers(0, ranks * shard - 1))
    end = data.draw(st.integers(start + 1, ranks * shard))
    owner = [place // shard for place in range(start, end)]
    for rank, span in enumerate(_spans(ranks, shard, bucket_start, start, end)):
        assert (span.first_rank, span.last_rank) == (owner[0], owner[-1])
        held = [element for element, holder in enumerate(owner) if holder == rank]
        if held:
            assert [*range(span.start, span.end)] == held
            assert span.numel_of(rank, end - start) == len(held)


def test_a_worked_example() -> None:
    """Shards of 4; the parameter has elements 3 to 9: one, then four, then two."""
    spans = _spans(3, 4, 100, 3, 10)
    assert [(span.start, span.end) for span in spans] == [(0, 1), (1, 5), (5, 7)]
