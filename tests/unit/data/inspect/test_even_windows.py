"""Windows spread over a source, never overlapping."""

import numpy as np
import pytest

from moetron.common.errors import UserError
from moetron.data.inspect.even_windows import named_sources, spread_windows
from moetron.data.stream.blend import open_blend
from tests.unit.data.conftest import MakeShard


def test_windows_are_spread_and_carry_the_next_token(make_shard: MakeShard) -> None:
    prefix = make_shard("text", [list(range(50)), list(range(50, 101))])
    (source,) = open_blend([prefix], 10).sources
    rows = spread_windows(source, tokens=35)  # room for ten windows, three wanted
    assert rows[:, 0].tolist() == [0, 30, 60]
    np.testing.assert_array_equal(rows, rows[:, :1] + np.arange(11))
    assert spread_windows(source, 10_000).shape == (10, 11)
    assert spread_windows(source, 1).shape == (1, 11)


def test_sources_have_given_names_or_their_prefixes(make_shard: MakeShard) -> None:
    a, b = make_shard("a", [[1, 2, 3]]), make_shard("b", [[4, 5, 6]])
    named = named_sources([f"code={a}", f"prose={b}"], 2)
    assert {name: source.prefix for name, source in named.items()} == {"code": a, "prose": b}
    assert list(named_sources([a, b], 2)) == list(named_sources(["1", a, "2", b], 2)) == ["a", "b"]
    with pytest.raises(UserError, match="no text"):
        named_sources([], 2)
    with pytest.raises(UserError, match="has no name; give NAME=PREFIX for each"):
        named_sources([f"code={a}", b], 2)
    with pytest.raises(UserError, match="too few for one sample"):
        named_sources([f"code={a}"], 3)
