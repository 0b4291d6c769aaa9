"""Losses by source and objective, and bits per byte."""

import math

import pytest
import torch

from moetron.moe.training.evaluate import bits_per_byte
from moetron.moe.training.loss_tally import Losses, Tally
from tests.unit.training.training_cases import CountingStream


def batch(**columns: list) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(values) for name, values in columns.items()}


def test_every_token_counts_once_for_its_source_and_once_for_its_objective() -> None:
    tally = Tally(CountingStream())
    samples = batch(
        loss_mask=[[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]],
        source=[2, 0, 0],
        objective=[1, 1, 0],
        filtered=[0, 0, 1],
    )
    losses = torch.tensor([[1.0, 3.0], [100.0, 8.0], [100.0, 100.0]])
    sums = tally.count(samples, losses)
    found = tally.read(sums + sums)  # two ranks
    assert found == Losses(
        4.0, 6, {"zero": 8.0, "two": 2.0}, {"odd": 4.0}, {"zero": 2, "two": 4}, 4
    )
    assert tally.read(tally.zeros(torch.device("cpu"))) == Losses(0.0, 0, {}, {}, {}, 0)


def test_bits_per_byte_weights_sources_by_their_text() -> None:
    """4 bytes per token in "zero" and 2 in "two"; 1 bit per token in both."""
    bit = math.log(2)
    losses = Losses(bit, 300, {"zero": bit, "two": bit}, {}, {"zero": 100, "two": 200}, 0)
    found = bits_per_byte(losses, CountingStream())
    assert found is not None
    assert found.by_source == {"zero": 0.25, "two": 0.5}
    assert found.all == pytest.approx(300 / 800)
    unknown = Losses(bit, 1, {"one": bit}, {}, {"one": 1}, 0)
    assert bits_per_byte(unknown, CountingStream()) is None
