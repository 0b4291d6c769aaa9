"""Expert capacity: number of slots and the choices that get them."""

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.transformer.moe.moe_utils import apply_router_token_dropping

from moetron.moe.routing.capacity import (
    NOT_CHOSEN,
    Capacity,
    Policy,
    fill_free_slots,
    from_groups,
    kept_choices,
    to_groups,
)


@pytest.mark.parametrize(
    ("capacity", "training", "expected"),
    [
        (Capacity(1.25), True, 320),  # 1.25 x 2 x 4096 / 32
        (Capacity(0.625), True, 160),
        (Capacity(1.25, includes_topk=False), True, 160),
        (Capacity(1.25, eval_factor=2.0, includes_topk=False), False, 256),
        (Capacity(1.25, eval_factor=2.0, includes_topk=False), True, 160),
        (Capacity(1.25), False, 320),
        (Capacity(0.01), True, 3),  # 2.56 rounded up
        (Capacity(0.01, includes_topk=False), True, 1),  # 1.28 rounded
        (Capacity(0.01, minimum=4), True, 4),
        (Capacity(100.0), True, 4096),
    ],
)
def test_slots(capacity: Capacity, training: bool, expected: int) -> None:
    assert capacity.slots(tokens=4096, experts=32, topk=2, training=training) == expected


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 7, 13])
@pytest.mark.parametrize("policy", get_args(Policy))
@pytest.mark.parametrize("includes_topk", [True, False])
def test_few_tokens_get_a_slot(tokens: int, policy: Policy, includes_topk: bool) -> None:
    """Odd numbers of tokens, and so few that the rule gives no slot."""
    slots = Capacity(0.3, includes_topk=includes_topk).slots(tokens, 16, 2, training=False)
    assert slots == 1
    generator = torch.Generator().manual_seed(tokens)
    probs = torch.rand(tokens, 16, generator=generator)
    chosen = torch.zeros_like(probs).bool().scatter(1, probs.topk(2, dim=1).indices, True)
    kept = kept_in_one_group(probs, chosen, slots, policy)
    assert torch.equal(kept.sum(0), chosen.sum(0).clamp(max=1))


CHOSEN = torch.tensor([[1, 0], [1, 1], [0, 1], [1, 1]]).bool()
PROBS = torch.tensor([[0.2, 0.0], [0.6, 0.4], [0.0, 0.3], [0.6, 0.4]])


@pytest.mark.parametrize(
    ("policy", "slots", "expected"),
    [
        ("position", 1, [[1, 0], [0, 1], [0, 0], [0, 0]]),
        ("position", 2, [[1, 0], [1, 1], [0, 1], [0, 0]]),
        ("probs", 1, [[0, 0], [1, 1], [0, 0], [0, 0]]),
        ("probs", 2, [[0, 0], [1, 1], [0, 0], [1, 1]]),
        # Rows 0, 1 and 3 choose expert 0 first, row 2 chooses expert 1, rows 1 and 3 it second.
        ("choice", 1, [[1, 0], [0, 0], [0, 1], [0, 0]]),
        ("choice", 2, [[1, 0], [1, 1], [0, 1], [0, 0]]),
        ("batch_prioritized", 1, [[0, 0], [1, 0], [0, 1], [0, 0]]),
        ("batch_prioritized", 2, [[0, 0], [1, 1], [0, 1], [1, 0]]),
        ("probs", 4, CHOSEN.int().tolist()),
        ("position", 4, CHOSEN.int().tolist()),
    ],
)
def test_kept_choices(policy: str, slots: int, expected: list[list[int]]) -> None:
    assert kept_in_one_group(PROBS, CHOSEN, slots, policy).int().tolist() == expected


def kept_in_one_group(
    probs: torch.Tensor, chosen: torch.Tensor, slots: int, policy: str
) -> torch.Tensor:
    """Return `kept_choices` of a single group."""
    priority = probs.masked_fill(~chosen, NOT_CHOSEN)[None]
    return kept_choices(priority, slots, policy, int(chosen.sum(1).max()))[0]


@pytest.mark.parametrize("policy", get_args(Policy))
def test_groups_are_independent(policy: str) -> None:
    priority = PROBS.masked_fill(~CHOSEN, NOT_CHOSEN)
    both = torch.stack([priority, priority.flip(0)])
    separate = [kept_choices(group[None], 1, policy, 2)[0] for group in both]
    assert torch.equal(kept_choices(both, 1, policy, 2), torch.stack(separate))


def test_first_rows_fill_free_slots() -> None:
    kept = torch.tensor([[0, 1], [0, 0], [1, 1], [0, 0]]).bool()[None]
    assert fill_free_slots(kept, 2)[0].int().tolist() == [[1, 1], [0, 0], [1, 1], [0, 0]]
    assert fill_free_slots(kept, 4).all()


@st.composite
def routings(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Draw probabilities without ties, top-k choices and slots."""
    tokens, experts = draw(st.integers(1, 24)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    probs = torch.rand(tokens, experts, generator=generator).add(0.1)
    best = probs.topk(draw(st.integers(1, experts)), dim=1).indices
    chosen = torch.zeros_like(probs).bool().scatter(1, best, True)
    return probs * chosen, chosen, draw(st.integers(1, tokens))


@settings(deadline=None)
@given(routings(), st.sampled_from(get_args(Policy)))
def test_only_full_experts_drop(
    routing: tuple[torch.Tensor, torch.Tensor, int], policy: str
) -> None:
    probs, chosen, slots = routing
    kept = kept_in_one_group(probs, chosen, slots, policy)
    dropped = chosen & ~kept
    assert not (kept & ~chosen).any()
    assert torch.equal(kept.sum(0), chosen.sum(0).clamp(max=slots))
    padded = fill_free_slots(kept[None], slots)[0]
    assert (padded.sum(0) == slots).all() and not (kept & ~padded).any()
    if policy not in ("probs", "position"):
        return
    rows = torch.arange(len(probs)).unsqueeze(1).expand_as(chosen)
    priority = probs if policy == "probs" else -rows.float()
    worst_kept = priority.masked_fill(~kept, torch.inf).amin(0)
    best_dropped = priority.masked_fill(~dropped, -torch.inf).amax(0)
    assert (worst_kept > best_dropped).all()


@settings(deadline=None)
@given(routings(), st.floats(0.1, 4))
def test_policy_probs_equals_megatron_core(
    routing: tuple[torch.Tensor, torch.Tensor, int], factor: float
) -> None:
    probs, chosen, _ = routing
    topk = int(chosen[0].sum())
    _, theirs = apply_router_token_dropping(probs, chosen, topk, factor)
    slots = Capacity(factor).slots(*probs.shape, topk, training=True)
    assert torch.equal(kept_in_one_group(probs, chosen, slots, "probs"), theirs)


def test_groups_of_two_sequences() -> None:
    rows = torch.tensor([[10, 20], [11, 21], [12, 22]]).unsqueeze(-1)  # [S, B, 1]
    assert to_groups(rows, "sequence").squeeze(-1).tolist() == [[10, 11, 12], [20, 21, 22]]
    assert to_groups(rows, "micro_batch").squeeze(-1).tolist() == [[10, 11, 12, 20, 21, 22]]
    for scope in ("sequence", "micro_batch"):
        assert torch.equal(from_groups(to_groups(rows, scope), 2), rows)
