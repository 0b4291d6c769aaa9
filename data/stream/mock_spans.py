"""Synthetic samples of an encoder-decoder: spans hidden in the walks of `MockStream`."""

from typing import Any

import numpy as np

from moetron.data.objectives.span_corruption import SpanCorruption
from moetron.data.stream.addresses import ENDLESS
from moetron.data.stream.mock_stream import MockStream

START, END = 0, 1


class MockSpans:
    """Span corruption of synthetic texts; the last ids of the vocabulary are the sentinels.

    Args:
        seed: of the run.
        vocab_size: ids of the model.
        seq_length: tokens of a sample.
        encoder_length: of them the encoder's.
        shape: noise density, mean span and examples, as of `SpanCorruption`.
    """

    def __init__(
        self,
        seed: int,
        vocab_size: int,
        seq_length: int,
        encoder_length: int,
        shape: tuple[float, float, int] = (0.15, 3.0, 1),
    ) -> None:
        sentinels = range(vocab_size - 1, vocab_size // 2, -1)
        self._objective = SpanCorruption(seq_length, encoder_length, sentinels, END, START, *shape)
        (raw,) = self._objective.windowing.advances
        self._texts = MockStream(seed, vocab_size // 2 - 2, raw)
        self._length, self._seed = seq_length, seed
        self.source_names, self.objective_names = ["mock"], list(self._objective.kinds)
        self.bytes_per_token: list[float | None] = [None]

    def __len__(self) -> int:
        """Return ``ENDLESS``."""
        return ENDLESS

    def __getitem__(self, n: int) -> dict[str, Any]:
        """Return sample ``n``; see ``TokenStream``."""
        row, mask = np.empty(self._length + 1, np.int64), np.ones(self._length, np.float32)
        text = self._texts[n]["tokens"] + 2
        made = self._objective.fill(text, 0, f"mock {self._seed} sample {n}", row, mask)
        segments = {} if made.segments is None else {"segments": made.segments}
        return {
            **segments,
            "tokens": row[:-1],
            "labels": row[1:],
            "loss_mask": mask,
            "source": 0,
            "objective": 0,
            "prefix": 0,
            "filtered": 0,
        }

    def state(self) -> dict[str, Any]:
        """Return what identifies the stream (JSON)."""
        return {**self._texts.state(), "objective": self._objective.state()}
