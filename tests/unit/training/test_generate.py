"""Choosing the next token."""

from collections import Counter

import pytest
import torch

from moetron.moe.training.generate import draw

LOGITS = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()


def _shares(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> dict[int, float]:
    generator = torch.Generator().manual_seed(0)
    draws = Counter(draw(LOGITS, temperature, top_k, top_p, generator) for _ in range(4000))
    return {token: count / 4000 for token, count in draws.items()}


def test_zero_temperature_takes_the_likeliest() -> None:
    assert _shares(temperature=0) == {1: 1.0}


def test_draws_follow_the_probabilities() -> None:
    assert _shares() == pytest.approx({0: 0.1, 1: 0.5, 2: 0.15, 3: 0.25}, abs=0.03)


def test_temperature_sharpens() -> None:
    """At temperature 1/2 probabilities are squared: 0.01, 0.25, 0.0225, 0.0625 of 0.345."""
    expected = {0: 0.01 / 0.345, 1: 0.25 / 0.345, 2: 0.0225 / 0.345, 3: 0.0625 / 0.345}
    assert _shares(temperature=0.5) == pytest.approx(expected, abs=0.03)


def test_top_k_keeps_so_many() -> None:
    assert _shares(top_k=2) == pytest.approx({1: 2 / 3, 3: 1 / 3}, abs=0.03)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.01, {1}), (0.5, {1}), (0.51, {1, 3}), (0.76, {1, 3, 2})]
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: set[int]) -> None:
    assert _shares(top_p=top_p).keys() == kept
