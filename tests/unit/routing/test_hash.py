"""The table of hash routing, and the path of token ids to the layers."""

import pytest
import torch
from router_cases import BATCH, EXPERTS, LENGTH, TOKENS, hidden_states, make_router
from router_cases import parallel_state as parallel_state

from moetron.moe.routing.hash import HashRouter, hash_table

IDS = torch.arange(TOKENS).view(BATCH, LENGTH)


def test_worked_table() -> None:
    """Three experts: each block of three ids maps to all; second choices are shifted by one."""
    table = hash_table(6, 3, 2, seed=1)
    for block in table.split(3):
        first, second = block.unbind(1)
        assert sorted(first.tolist()) == [0, 1, 2]
        assert second.tolist() == first.roll(-1).tolist()


@pytest.mark.parametrize("topk", [1, 3, 5])
def test_every_expert_gets_equally_many_ids(topk: int) -> None:
    table = hash_table(5 * 40, 5, topk, seed=7)
    assert torch.bincount(table.flatten(), minlength=5).tolist() == [40 * topk] * 5
    assert all(len(set(row)) == topk for row in table.tolist())
    assert not torch.equal(table, hash_table(5 * 40, 5, topk, seed=8))


def test_a_longer_table_begins_with_the_shorter_one() -> None:
    assert torch.equal(hash_table(1000, 7, 2, 3)[:333], hash_table(333, 7, 2, 3))


def _hashed(layer: int = 1) -> HashRouter:
    router = make_router(moe_router_type="hash")
    assert isinstance(router, HashRouter)
    router.set_layer_number(layer)
    router.draw_table(TOKENS)
    return router


def test_choices_depend_only_on_ids() -> None:
    router = _hashed()
    router.read(IDS)
    probs, chosen = router(hidden_states())
    assert torch.equal(router(-hidden_states())[1], chosen)
    expected = torch.zeros(TOKENS, EXPERTS).scatter(1, router.table[IDS.T.flatten()], 0.5)
    assert torch.equal(probs, expected) and torch.equal(chosen, expected > 0)
    assert list(router.parameters()) == []
    other = _hashed(layer=2)
    assert not torch.equal(other.table, router.table)


def test_a_checkpoint_keeps_its_table() -> None:
    ours, theirs = _hashed(), _hashed()
    ours.config.routing_seed += 1
    ours.draw_table(TOKENS)
    assert not torch.equal(ours.table, theirs.table)
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.table, theirs.table)


def test_recomputed_passes_use_their_own_ids() -> None:
    """Three micro-batches run ahead without gradient before the first is recomputed."""
    router = _hashed()
    batches = [IDS.roll(n) for n in range(3)]
    ahead = []
    for ids in batches:
        router.read(ids)
        with torch.no_grad():
            ahead.append(router(hidden_states())[1])
    again = [router(hidden_states())[1] for _ in batches]
    for first, second in zip(ahead, again, strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(ahead[0], ahead[1])
