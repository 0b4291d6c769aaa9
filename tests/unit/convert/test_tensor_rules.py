"""Transforms on worked examples."""

import pytest
import torch

from moetron.moe.convert.families.tensor_rules import (
    FirstRows,
    GateUp,
    PerExpert,
    QueryKeyValue,
    Transform,
    Whole,
)


def test_fused_projection_is_split_by_group() -> None:
    """Two groups of two query heads, one channel per head: q q k v, q q k v."""
    fused = torch.tensor([10, 11, 20, 30, 12, 13, 21, 31])
    query, key, value = QueryKeyValue(heads=4, groups=2, head_dim=1).split(fused)
    assert query.tolist() == [10, 11, 12, 13]
    assert (key.tolist(), value.tolist()) == ([20, 21], [30, 31])


def test_experts_are_in_order_and_gate_precedes_up() -> None:
    stack = torch.tensor([[[1], [2]], [[3], [4]]])  # [experts, 2F, H] = [2, 2, 1]
    parts = PerExpert(2, GateUp()).split(stack)
    assert [part.item() for part in parts] == [1, 2, 3, 4]


def test_padding_rows_are_left_out() -> None:
    (rows,) = FirstRows(2).split(torch.arange(3))
    assert rows.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("transform", "shape"),
    [
        (Whole(), (3, 2)),
        (FirstRows(3), (3, 2)),
        (QueryKeyValue(6, 2, 4), (40, 5)),
        (QueryKeyValue(6, 2, 4), (40,)),
        (GateUp(), (6, 2)),
        (PerExpert(3, GateUp()), (3, 8, 2)),
        (PerExpert(3, Whole()), (3, 4, 2)),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_joining_undoes_splitting(
    transform: Transform, shape: tuple[int, ...], device: str
) -> None:
    ours = torch.randn(shape, device=device)
    again = transform.join(transform.split(ours))
    assert again.shape == ours.shape
    assert device == "meta" or torch.equal(again, ours)
