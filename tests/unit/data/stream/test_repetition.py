"""Repetitive samples have no loss."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetron.common.errors import UserError
from moetron.data.objectives.causal import Causal
from moetron.data.stream.repetition import RepetitionFilter
from moetron.data.stream.stages import Stage, StagedStream


@given(
    period=st.integers(1, 13),
    times=st.integers(4, 9),
    before=st.integers(0, 200),
    after=st.integers(0, 200),
    dtype=st.sampled_from([np.uint16, np.int32]),
)
def test_the_probes_miss_nothing(period, times, before, after, dtype) -> None:
    """Insert an n-gram of distinct tokens between tokens that occur once each."""
    gram = np.arange(period)
    parts = [100 + np.arange(before), np.tile(gram, times), 500 + np.arange(after)]
    raw = np.concatenate(parts).astype(dtype)
    assert RepetitionFilter(7).masks(raw) == (times >= 7)
    assert period == 1 or not RepetitionFilter(7, max_period=period - 1).masks(raw)


def test_random_tokens_pass_even_where_pairs_are_frequent() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        assert not RepetitionFilter(32).masks(generator.integers(0, 3, 4096))


def test_a_filtered_sample_is_fed_without_loss(make_shard) -> None:
    tokens = [*range(10, 74), *([5, 6] * 32), 7]
    prefix = make_shard("a", [tokens])
    stream = StagedStream(
        [Stage([prefix], Causal(64), 1)], 64, repetition=RepetitionFilter(max_count=32)
    )
    samples = {int(stream[n]["tokens"][0]): stream[n] for n in (0, 1)}
    assert samples[10]["loss_mask"].sum() == 64 and samples[10]["filtered"] == 0
    assert samples[5]["loss_mask"].sum() == 0 and samples[5]["filtered"] == 1
    assert samples[5]["tokens"].tolist() == [5, 6] * 32
    state = stream.state()["stages"][0]["repetition"]
    assert state == {"max_count": 32, "max_period": 13}


def test_too_low_a_count_is_refused() -> None:
    with pytest.raises(UserError, match="give at least 5"):
        RepetitionFilter(4)
