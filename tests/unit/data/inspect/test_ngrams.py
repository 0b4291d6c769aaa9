"""Count-based baselines of a trained model."""

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moetron.data.inspect import ngrams
from moetron.data.inspect.ngrams import NgramModels, cross_entropies

STREAMS = st.lists(st.lists(st.integers(0, 6), max_size=40), max_size=3)


def models_of(*streams: list[int], vocab_size: int) -> NgramModels:
    return NgramModels([np.array(stream, np.uint16) for stream in streams], vocab_size)


def test_worked_example() -> None:
    """Tokens 0 1 0 1 0 2 of V = 4: pairs 01 x2, 10 x2, 02 x1; too small a text: D = 0.75.

    Unigram: counts 3 2 1 0, 3 x 0.75 freed over 4 ids. Continuations: 0 after {1}, 1 after {0},
    2 after {0}: counts 1 1 1 0 of 3. After 0: counts of 1 and 2 are 2 and 1 of 3, 1.5 freed.
    """
    models = models_of([0, 1, 0, 1, 0, 2], vocab_size=4)
    shared = 2.25 / 4
    expected = [(3 - 0.75 + shared) / 6, (2 - 0.75 + shared) / 6, (0.25 + shared) / 6, shared / 6]
    np.testing.assert_allclose(models.unigram, expected)
    lower = np.array([(0.25 + shared) / 3] * 3 + [shared / 3])
    after_0 = (np.array([0, 1.25, 0.25, 0]) + 1.5 * lower) / 3
    after_1 = (np.array([1.25, 0, 0, 0]) + 0.75 * lower) / 2
    every = np.arange(4)
    np.testing.assert_allclose(models.bigram(np.full(4, 0), every), after_0)
    np.testing.assert_allclose(models.bigram(np.full(4, 1), every), after_1)
    np.testing.assert_allclose(models.bigram(np.full(4, 3), every), lower)  # 3 was never seen


@given(streams=STREAMS)
@example(streams=[[2, 0, 0, 0, 0, 0, 1, 0, 1, 0, 1, 0, 2, 0]])  # a discount estimated below 0
def test_probabilities_are_positive_and_sum_to_one(streams: list[list[int]]) -> None:
    models = models_of(*streams, vocab_size=8)
    before, after = np.divmod(np.arange(64), 8)
    table = models.bigram(before, after).reshape(8, 8)
    assert models.unigram.min() > 0
    assert table.min() > 0
    np.testing.assert_allclose(models.unigram.sum(), 1)
    np.testing.assert_allclose(table.sum(axis=1), 1)


def test_discounts_follow_chen_and_goodman() -> None:
    """n1..n4 = 8, 4, 2, 1: Y = 1/2, D1 = 1 - 4/8, D2 = 2 - 3/2 x 2/4, D3+ = 3 - 2 x 1/2."""
    counts = np.repeat([1, 2, 3, 4, 90], [8, 4, 2, 1, 1])
    np.testing.assert_allclose(ngrams._discounts(counts), [0, 0.5, 1.25, 2.0])


def test_chunks_do_not_change_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = np.random.default_rng(1).integers(0, 50, 1000).astype(np.int32)
    before, after = np.divmod(np.arange(2500), 50)
    unchunked = NgramModels([stream], 50).bigram(before, after)
    monkeypatch.setattr(ngrams, "CHUNK_TOKENS", 7)
    np.testing.assert_array_equal(NgramModels([stream], 50).bigram(before, after), unchunked)


def test_streams_are_not_joined() -> None:
    apart, joined = models_of([0, 1], [2, 3], vocab_size=4), models_of([0, 1, 2, 3], vocab_size=4)
    one, two = np.array([1]), np.array([2])
    assert joined.bigram(one, two) > 2 * apart.bigram(one, two)


def test_a_first_order_chain_is_learned() -> None:
    """The bigram reaches the chain's entropy rate; the unigram is far from it."""
    generator = np.random.default_rng(3)
    steps = generator.choice([1, 2, 5], p=[0.7, 0.2, 0.1], size=60_000)
    stream = np.cumsum(steps) % 64
    rate = -sum(p * math.log(p) for p in (0.7, 0.2, 0.1))
    models = NgramModels([stream[:50_000]], 64)
    rows = stream[50_000:]
    found = cross_entropies(models, [(rows[None, :-1], rows[None, 1:], np.ones((1, 9_999)))])
    assert found.tokens == 9_999
    assert rate * 0.97 < found.bigram < rate * 1.03
    assert found.unigram == pytest.approx(math.log(64), rel=0.01)


def test_masked_labels_do_not_count() -> None:
    models = models_of([0, 1, 0, 1, 0, 2], vocab_size=4)
    tokens, labels = np.array([[0, 1, 0]]), np.array([[1, 0, 3]])
    found = cross_entropies(models, [(tokens, labels, np.array([[1.0, 1.0, 0.0]]))])
    expected = -np.log(models.bigram(tokens[0, :2], labels[0, :2])).mean()
    assert found.bigram == pytest.approx(expected)
    assert found.unigram == pytest.approx(-np.log(models.unigram[[1, 0]]).mean())
    with pytest.raises(ValueError, match="no validation token"):
        cross_entropies(models, [(tokens, labels, np.zeros((1, 3)))])
