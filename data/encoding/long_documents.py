"""Documents encoded while they are written, because they are too long to hold in memory."""

from collections import Counter, deque
from collections.abc import Iterator

import numpy as np

from moetron.data.encoding.encode import Encoding, compare_engines, is_held_out
from moetron.data.encoding.filters import Filters
from moetron.data.encoding.frequent_words import are_frequent
from moetron.data.encoding.long_text import pieces
from moetron.data.readers.chunks import LongChunk
from moetron.data.readers.long_rows import LongText
from moetron.data.shards.indexed_format import LENGTH, token_dtype
from moetron.data.shards.ngram_runs import MAX_PERIOD
from moetron.tokenizers.fast_bpe import FastBPE
from moetron.tokenizers.interface import Tokenizer

MAX_BYTES = np.iinfo(LENGTH).max - (1 << 20)
"""Maximum text size whose tokens an index can count; a tokenizer may add a few to them."""


class LeftOut(Exception):
    """Exception: a rule drops a document; the argument is the rule's name."""


class LongDocument:
    """Document that is encoded part by part."""

    def __init__(self, encoding: Encoding, chunk: LongChunk, tokenizer: Tokenizer) -> None:
        self.chunk = chunk
        self.text_bytes = 0
        """UTF-8 bytes of the text encoded so far."""
        self.encoded_tokens = 0
        self._encoding, self._tokenizer = encoding, tokenizer
        self._text: LongText | None = None

    def side(self) -> int:
        """Return 0 for training, 1 for validation; raises LeftOut or Unreadable."""
        filters = self._encoding.filters
        self._text = LongText(self.chunk, self._encoding.text_key)
        if self._text.empty:
            raise LeftOut("empty")
        if (rule := filters.by_row(self._text.row)) is not None:
            deque(self._text.blocks(), maxlen=0)  # invalid text counts as bad first
            raise LeftOut(rule)
        return int(is_held_out(self._text.blocks(), self._encoding.holdout_fraction))

    def tokens(self) -> Iterator[np.ndarray]:
        """Yield ids in the shard's dtype, with end-of-document; raises LeftOut or Unreadable."""
        assert self._text is not None, "side() comes first"
        dtype = token_dtype(self._tokenizer.vocab_size)
        rules = _Rules(self._encoding.filters)
        for piece in pieces(self._text.blocks(), self._tokenizer):
            if isinstance(self._tokenizer, FastBPE):
                compare_engines(self._tokenizer, [piece], len(piece))
            self.text_bytes += len(piece.encode())
            if self.text_bytes > MAX_BYTES:
                raise LeftOut("too long for an index")
            ids = self._tokenizer.encode_flat([piece])[0].astype(dtype)
            self.encoded_tokens += ids.size
            rules.add(piece, ids)
            yield ids
        rules.check()
        if self._encoding.append_eod:
            yield np.array([self._tokenizer.eod], dtype)


class _Rules:
    """State of the filters on text and tokens, updated piece by piece."""

    def __init__(self, filters: Filters) -> None:
        self._filters = filters
        self._words = Counter[str]()
        self._tokens = 0
        self._repetitive = False
        self._tail = np.empty(0, np.int32)

    def add(self, piece: str, ids: np.ndarray) -> None:
        """Add a piece; a repetition may start in earlier pieces."""
        filters = self._filters
        if filters.frequent_words:
            self._words.update(piece.split())
        self._tokens += ids.size
        if filters.max_repetitions is not None:
            seen = np.concatenate([self._tail, ids])
            lengths = np.array([seen.size])
            self._repetitive |= any(
                caught[0]
                for name, caught in filters.by_tokens(seen, lengths)
                if name == "repetitive"
            )
            self._tail = seen[-MAX_PERIOD * filters.max_repetitions :]

    def check(self) -> None:
        """Raise LeftOut by the rules of ``Filters`` on a complete document, in the same order."""
        filters = self._filters
        if filters.frequent_words and are_frequent(self._words):
            raise LeftOut("frequent words")
        if self._tokens < filters.min_tokens:
            raise LeftOut("short")
        if filters.max_tokens is not None and self._tokens > filters.max_tokens:
            raise LeftOut("long")
        if self._repetitive:
            raise LeftOut("repetitive")
