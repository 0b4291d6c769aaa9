"""Windows spread evenly over a shard: a small, fixed part of a text to watch a model on."""

import numpy as np

from moetron.data.errors import DataError
from moetron.data.shard import Shard


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
