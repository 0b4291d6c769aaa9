"""Windows spread evenly over a shard: a small, fixed part of a text to watch a model on."""

from collections.abc import Sequence

import numpy as np

from moetron.data.blend import open_blend
from moetron.data.errors import DataError
from moetron.data.shard import Shard

Shards = dict[str, Shard]
"""The text of each class, by its name."""


def named_shards(items: Sequence[str]) -> Shards:
    """Open ``[NAME=PREFIX, ...]``, or a data path, whose shards are named by their prefixes.

    Raises:
        DataError: there are none, some have no name, or one cannot be used.
    """
    if not items:
        raise DataError("no text to look at: name it as NAME=PREFIX, such as code=data/code")
    named = [item for item in items if "=" in item]
    if not named:
        return {source.name: source.shard for source in open_blend(items, 1).sources}
    if len(named) < len(items):
        bare = " ".join(item for item in items if item not in named)
        raise DataError(f"{bare}: write NAME=PREFIX for each, such as code=data/code")
    return {name: Shard(prefix) for name, _, prefix in (item.partition("=") for item in items)}


def spread_windows(shard: Shard, seq_length: int, tokens: int) -> np.ndarray:
    """About ``tokens`` tokens of a shard in windows that do not overlap, int64 [B, S + 1].

    Each row has a token more than ``seq_length``, so that every token has the one that follows it.

    Raises:
        DataError: the shard is shorter than one window.
    """
    available = (len(shard.tokens) - 1) // seq_length
    count = min(max(tokens // seq_length, 1), available)
    if count < 1:
        raise DataError(
            f"{shard.prefix}: {len(shard.tokens)} tokens are too few for one window of "
            f"{seq_length} + 1"
        )
    starts = np.arange(count) * available // count * seq_length
    places = starts[:, None] + np.arange(seq_length + 1)
    return shard.tokens[places].astype(np.int64)
