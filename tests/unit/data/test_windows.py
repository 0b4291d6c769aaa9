"""Windows to watch a model on: spread over the shard, never overlapping."""

import numpy as np
import pytest

from moetron.data.errors import DataError
from moetron.data.shard import Shard
from moetron.data.windows import named_shards, spread_windows
from tests.unit.data.conftest import MakeShard


def test_windows_are_spread_and_carry_the_next_token(make_shard: MakeShard) -> None:
    shard = Shard(make_shard("text", [list(range(50)), list(range(50, 101))]))
    rows = spread_windows(shard, seq_length=10, tokens=35)  # room for ten windows, three wanted
    assert rows[:, 0].tolist() == [0, 30, 60]
    np.testing.assert_array_equal(rows, rows[:, :1] + np.arange(11))
    assert spread_windows(shard, 10, 10_000).shape == (10, 11)
    assert spread_windows(shard, 100, 1).shape == (1, 101)


def test_a_shard_shorter_than_a_window_is_refused(make_shard: MakeShard) -> None:
    with pytest.raises(DataError, match="too few for one window"):
        spread_windows(Shard(make_shard("text", [[1, 2, 3]])), 3, 100)


def test_shards_are_named_or_bear_their_prefix(make_shard: MakeShard) -> None:
    a, b = make_shard("a", [[1, 2, 3]]), make_shard("b", [[4, 5, 6]])
    assert list(named_shards([f"code={a}", f"prose={b}"])) == ["code", "prose"]
    assert list(named_shards([a, b])) == ["a", "b"]
    with pytest.raises(DataError, match="no text"):
        named_shards([])
    with pytest.raises(DataError, match="NAME=PREFIX for each"):
        named_shards([f"code={a}", b])
