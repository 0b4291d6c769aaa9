"""Windows spread evenly over a source: a small, fixed sample of a text."""

from collections.abc import Sequence

import numpy as np

from moetron.common.data_path import split_data_path
from moetron.common.errors import UserError
from moetron.data.stream.blend import Source, open_blend

Sources = dict[str, Source]
"""Source of each class, by its name."""


def named_sources(items: Sequence[str], seq_length: int) -> Sources:
    """Open ``[NAME=PREFIX, ...]``, or a data path, whose sources are named by their prefixes.

    Raises:
        UserError: there are none, some have no name, or one cannot be used.
    """
    if not items:
        raise UserError("no text given; give NAME=PREFIX, such as code=data/code")
    named = [item for item in items if "=" in item]
    if named and len(named) < len(items):
        bare = " ".join(item for item in items if item not in named)
        raise UserError(f"{bare}: has no name; give NAME=PREFIX for each, such as code=data/code")
    pairs = [item.partition("=")[::2] for item in named]
    prefixes = [prefix for _, prefix in pairs] or split_data_path(items)[1]
    sources = open_blend(prefixes, seq_length).sources
    names = [name for name, _ in pairs] or [source.name for source in sources]
    return dict(zip(names, sources, strict=True))


def spread_windows(source: Source, tokens: int) -> np.ndarray:
    """Return about ``tokens`` tokens of a source, between one window and all: int64 [B, S + 1].

    Each row has one token more than a sample, so that every token has a successor.
    """
    seq_length = round(source.windowing.mean_advance)
    count = min(max(tokens // seq_length, 1), source.windows)
    windows = np.arange(count) * source.windows // count
    return np.stack([source.read(int(window))[1] for window in windows]).astype(np.int64)
