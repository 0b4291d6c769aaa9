"""T5's span corruption for an encoder-decoder (Raffel et al. 2020, section 3.1.4)."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from moetron.common.errors import UserError
from moetron.data.addressing.windowing import Windowing
from moetron.data.objectives.objective import Made
from moetron.data.objectives.spans import corrupted_lengths, draws, hide_spans, span_counts


class SpanCorruption:
    """Samples of one or several texts, whose spans are hidden from the encoder.

    The encoder reads the kept tokens, a sentinel in place of each hidden span, and an end; the
    decoder predicts each sentinel, its span, and an end. A text has as many raw tokens as fill the
    encoder's part exactly, or nearly (``random_spans_helper`` of the T5 code: 512 inputs take 568
    raw tokens and give 114 targets). Tokens and labels of a sample share memory, shifted by one: in
    a decoder's part with several texts, a position after each text's last target reads that target
    and is padding. T5 joins documents without an end; here a shard's ends of documents stay.
    """

    kinds: tuple[str, ...] = ("span corruption",)

    def __init__(
        self,
        seq_length: int,
        encoder_length: int,
        sentinels: Sequence[int],
        end: int,
        start: int,
        noise_density: float = 0.15,
        mean_span: float = 3.0,
        examples: int = 1,
    ) -> None:
        """Compute the lengths.

        Args:
            seq_length: tokens of a sample (S).
            encoder_length: of them the encoder's, a multiple of ``examples``.
            sentinels: ids of hidden spans, in the order of use.
            end: id that ends inputs and targets.
            start: first id of the decoder (T5: 0), also padding.
            noise_density: fraction of tokens hidden.
            mean_span: mean length of a hidden span.
            examples: texts in a sample.

        Raises:
            UserError: there are too few sentinels, or a part is too short.
        """
        self._shape = noise_density, mean_span
        self._sentinels = np.array(sentinels, np.int64)
        self._end, self._start, self._examples = end, start, examples
        self._encoder = encoder_length
        room = encoder_length // examples
        fits = (n for n in range(2 * room, 1, -1) if corrupted_lengths(n, *self._shape)[0] <= room)
        self.raw_tokens = next(fits, 0)
        """Raw tokens of a text."""
        if self.raw_tokens < 2:
            raise UserError(f"span corruption: no text fits into {room} tokens; use longer inputs")
        self.inputs, self.targets = corrupted_lengths(self.raw_tokens, *self._shape)
        """Tokens of a text in the encoder, and labels in the decoder."""
        needed = examples * (self.targets + 1) - 1
        if needed > seq_length - encoder_length:
            raise UserError(
                f"span corruption: {self.inputs} inputs of a text have {self.targets} targets, "
                f"{examples} text(s) {needed} positions of the decoder, but --seq-length leaves "
                f"{seq_length - encoder_length}: use --seq-length {encoder_length + needed}"
            )
        spans = span_counts(self.raw_tokens, *self._shape)[1]
        if spans > len(sentinels):
            raise UserError(
                f"span corruption: {self.raw_tokens} tokens have {spans} hidden spans, but the "
                f"tokenizer has {len(sentinels)} sentinels; use a larger --examples-per-sample or "
                "a tokenizer with more sentinels"
            )
        self.windowing = Windowing((examples * self.raw_tokens,), overlap=0)
        self._segments = self._lay_out(seq_length)

    def _lay_out(self, seq_length: int) -> np.ndarray | None:
        """Return the example of each position, int64 [S], 0: padding; None: all of one text."""
        segments = np.zeros(seq_length, np.int64)
        for example in range(self._examples):
            inputs, targets = self._places(example)
            segments[inputs : inputs + self.inputs] = example + 1
            segments[targets : targets + self.targets] = example + 1
        return None if (segments == 1).all() else segments

    def _places(self, example: int) -> tuple[int, int]:
        """Return the first positions of a text's inputs and of its decoder's part."""
        room = self._encoder // self._examples
        return example * room, self._encoder + example * (self.targets + 1)

    def fill(self, raw: np.ndarray, slot: int, key: str, row: np.ndarray, mask: np.ndarray) -> Made:
        """Hide spans of the raw tokens; see ``Objective``."""
        row[:] = self._start
        mask[:] = 0.0
        for example, text in enumerate(np.split(raw.astype(np.int64), self._examples)):
            uniform = draws(f"{key} {example}", text.size)
            kept, hidden = hide_spans(text, *self._shape, self._sentinels, uniform)
            inputs, targets = self._places(example)
            row[inputs : inputs + self.inputs] = np.append(kept, self._end)
            row[targets] = self._start
            row[targets + 1 : targets + 1 + self.targets] = np.append(hidden, self._end)
            mask[targets : targets + self.targets] = 1.0
        return Made(0, segments=self._segments)

    def state(self) -> dict[str, Any]:
        """Return the noise, the examples and the encoder's part."""
        density, mean_span = self._shape
        return {
            "name": "span_corruption",
            "noise_density": density,
            "mean_span": mean_span,
            "encoder_length": self._encoder,
            "examples": self._examples,
        }
