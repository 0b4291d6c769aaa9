"""Balanced assignment against all alternatives."""

from itertools import permutations

import pytest
import torch

pytest.importorskip("scipy")
from megatron.core.transformer.moe import moe_utils

from moetron.moe.routing.assignment import linear_assignment, sinkhorn


def test_worked_assignment() -> None:
    """Both rows prefer expert 0; 5 + 3 beats 4 + 1."""
    assert linear_assignment(torch.tensor([[5.0, 1.0], [4.0, 3.0]])).int().tolist() == [
        [1, 0],
        [0, 1],
    ]


def test_no_balanced_assignment_has_a_higher_score() -> None:
    scores = torch.randn(6, 3, generator=torch.Generator().manual_seed(2))
    chosen = linear_assignment(scores)
    assert chosen.sum(0).tolist() == [2, 2, 2] and chosen.sum(1).tolist() == [1] * 6
    best = max(
        sum(float(scores[row, seat // 2]) for row, seat in enumerate(seats))
        for seats in permutations(range(6))
    )
    assert float(scores[chosen].sum()) == pytest.approx(best)


def test_more_experts_than_tokens() -> None:
    chosen = linear_assignment(torch.randn(5, 3))
    assert chosen.sum(1).tolist() == [1] * 5 and chosen.sum(0).max() <= 2


@pytest.mark.parametrize("deviation", [0.02, 0.3, 1.0])
def test_sinkhorn_is_megatrons(deviation: float) -> None:
    logits = deviation * torch.randn(64, 8, generator=torch.Generator().manual_seed(3))
    assert torch.equal(sinkhorn(logits), moe_utils.sinkhorn(logits))


def test_sinkhorn_ends_where_megatrons_runs_for_minutes() -> None:
    logits = 8 * torch.randn(64, 8, generator=torch.Generator().manual_seed(3))
    balanced = sinkhorn(logits)
    assert balanced.isfinite().all()
    assert balanced.sum(0).std() < 0.1 * logits.softmax(1).mean(0).std()
