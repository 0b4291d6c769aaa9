from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetron.common.errors import UserError
from moetron.data.addressing.apportionment import MAX_TOTAL, Apportionment, integer_weights

BOUND = 1.68
weights_of_any_size = st.lists(
    st.one_of(st.floats(1e-9, 1.0), st.floats(1e-3, 1e3), st.integers(1, 10**9).map(float)),
    min_size=1,
    max_size=30,
)


def realised(apportionment: Apportionment, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return source [n], rank [n] and counts after each prefix [n + 1, sources] of n samples."""
    sources, ranks = apportionment.locate(np.arange(n))
    dealt = np.zeros((n + 1, len(apportionment.weights)), np.int64)
    dealt[np.arange(1, n + 1), sources] = 1
    return sources, ranks, np.cumsum(dealt, axis=0)


@settings(max_examples=60)
@given(weights=weights_of_any_size)
def test_every_prefix_is_proportional(weights: list[float]) -> None:
    n = 3000
    apportionment = Apportionment(weights)
    sources, ranks, counts = realised(apportionment, n)
    fraction = np.array(weights) / sum(weights)
    assert np.abs(counts - np.arange(n + 1)[:, None] * fraction).max() < BOUND
    assert np.array_equal(ranks, counts[np.arange(n), sources])  # earlier samples of the source
    assert apportionment.counts(n) == counts[-1].tolist()


@pytest.mark.parametrize("count", [2, 10, 30])
def test_fibonacci_weights_make_the_deepest_tree(count: int) -> None:
    weights = [1, 1]
    while len(weights) < count:
        weights.append(weights[-1] + weights[-2])
    n = 30_000
    _, _, counts = realised(Apportionment(weights), n)
    fraction = np.array(weights) / sum(weights)
    assert np.abs(counts - np.arange(n + 1)[:, None] * fraction).max() < BOUND


@given(
    weights=st.lists(st.floats(1e-6, 1.0), min_size=2, max_size=30),
    first=st.integers(0, 1 << 60),
)
def test_far_samples_agree_with_counts(weights: list[float], first: int) -> None:
    apportionment = Apportionment(weights)
    samples = np.arange(first, first + 50)
    sources, ranks = apportionment.locate(samples)
    for n, source, rank in zip(samples.tolist(), sources, ranks, strict=True):
        before, after = apportionment.counts(n), apportionment.counts(n + 1)
        assert before[source] == rank and sum(before) == n
        assert [b - a for a, b in zip(before, after, strict=True)] == [
            int(s == source) for s in range(len(weights))
        ]


@settings(max_examples=60)
@given(sizes=st.lists(st.integers(1, 200), min_size=1, max_size=12))
def test_by_size_no_source_repeats_before_all_have_ended(sizes: list[int]) -> None:
    total = sum(sizes)
    _, _, counts = realised(Apportionment(sizes), 2 * total)
    assert counts[total].tolist() == sizes
    assert (counts[: total + 1] <= np.array(sizes)).all()


def test_openmoe_v1_weights_are_exact() -> None:
    percent = [7.5, 2.25, 1.0, 1.25, 2.25, 2.25, 33.5, 50]
    assert integer_weights(percent) == [30, 9, 4, 5, 9, 9, 134, 200]
    assert Apportionment(percent).counts(400) == [30, 9, 4, 5, 9, 9, 134, 200]


def test_a_tiny_weight_is_drawn_exactly_enough() -> None:
    apportionment = Apportionment([1.0, 1e-7])
    for n in (10**6, 10**7, 10**8):
        assert abs(apportionment.counts(n)[1] - n * 1e-7) < 2


@given(weights=weights_of_any_size)
def test_integer_weights_keep_the_proportions(weights: list[float]) -> None:
    counts = integer_weights(weights)
    assert sum(counts) <= MAX_TOTAL and min(counts) >= 1
    exact = [Fraction(str(w)) / sum(Fraction(str(w)) for w in weights) for w in weights]
    for count, fraction in zip(counts, exact, strict=True):
        assert abs(Fraction(count, sum(counts)) - fraction) <= Fraction(len(weights), MAX_TOTAL)


@pytest.mark.parametrize("weights", [[], [0.0, 1.0], [1.0, -2.0], [float("nan")], [float("inf")]])
def test_refuses_invalid_weights(weights: list[float]) -> None:
    with pytest.raises(UserError):
        Apportionment(weights)
