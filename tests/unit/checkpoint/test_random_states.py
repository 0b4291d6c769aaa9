"""Random-number states that CUDA graphs and attention refer to."""

from collections.abc import Iterator

import pytest
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from moetron.moe.checkpoint import random_states as rng
from tests.parallel.support.harness import model_parallel


@pytest.fixture(autouse=True)
def _single_rank() -> Iterator[None]:
    with model_parallel():
        yield


def test_generators_of_cuda_graphs_continue(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph and attention hold the generators themselves: a state is restored into them."""
    monkeypatch.setattr(rng, "is_graph_safe_cuda_rng_tracker", lambda _: True)
    tracker, generator = get_cuda_rng_tracker(), torch.Generator().manual_seed(1)
    monkeypatch.setattr(tracker, "states_", {"model-parallel-rng": generator})
    entries = {key: entry.data.clone() for key, entry in rng.rng_entries().items()}
    expected = torch.rand(3, generator=generator)
    rng.restore_rng(entries)
    assert tracker.get_states() == {"model-parallel-rng": generator}
    assert torch.equal(torch.rand(3, generator=generator), expected)


def test_reseeding_keeps_the_tracker_that_attention_holds() -> None:
    tracker = get_cuda_rng_tracker()
    before = torch.get_rng_state()
    rng.reseed(1, 1)
    assert get_cuda_rng_tracker() is tracker
    assert not torch.equal(torch.get_rng_state(), before)
