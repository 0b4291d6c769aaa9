"""Losses by source and objective, and bits per byte."""

import math

import pytest
import torch

from moetron.moe.preference.pair_losses import PreferenceLoss
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


def _preferences(kind: PreferenceLoss, *values: float) -> tuple[Losses, torch.Tensor]:
    """Return losses, and the trained sums of one of two ranks, with SUMS of two places."""
    tally = Tally(CountingStream(), kind)
    sums = tally.zeros(torch.device("cpu"))
    per_place = torch.tensor(values).view(7, 1, 1).expand(7, 1, 2)
    tally.count_preferences(sums, per_place, torch.tensor(2))
    return tally.read(sums + sums), tally.trained(sums)


def test_means_over_pairs() -> None:
    losses, trained = _preferences("dpo", 0.5, 1.0, 0.25, -0.5, 0.0, 1.0, 1.0)
    assert losses.preferences == {
        "preference_loss": 0.5,
        "accuracy": 1.0,
        "chosen_reward": 0.25,
        "rejected_reward": -0.5,
        "margin": 0.75,
    }
    assert trained.tolist() == [1.0, 2.0]
    assert losses.objective == ("preference_loss", 0.5)
    assert Losses(3.0, 1, {}, {}, {}, 0).objective == ("lm_loss", 3.0)


def test_means_over_wanted_answers_alone() -> None:
    """Two of KTO's examples a rank, none of them unwanted: no reward of those, no margin."""
    losses, _ = _preferences("kto", 0.5, 0.0, 0.25, 0.0, 2.0, 1.0, 0.0)
    expected = {"preference_loss": 0.5, "accuracy": 0.0, "chosen_reward": 0.25, "kl": 2.0}
    assert losses.preferences == expected


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
