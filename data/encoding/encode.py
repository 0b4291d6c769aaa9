"""Encode one chunk of raw rows to token ids."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby

import numpy as np

from moetron.data.encoding.filters import Filters
from moetron.data.encoding.long_text import PIECE_CHARACTERS, blocks, pieces
from moetron.data.readers.chunks import Chunk, Cursor, LongChunk, Reject
from moetron.data.shards.indexed_format import token_dtype
from moetron.tokenizers.fast_bpe import FastBPE, first_difference, open_fast
from moetron.tokenizers.interface import Tokenizer
from moetron.tokenizers.load import load_tokenizer

COMPARED_FRACTION = 1 / 8192
"""Fraction of the text that the reference encodes too: a piece of one document of each chunk."""
COMPARED_CHARACTERS = 100
"""Minimum length of such a piece, if its document is as long."""


@dataclass(frozen=True)
class Encoding:
    """Settings of encoding."""

    tokenizer: str
    """Argument of ``load_tokenizer``."""
    text_key: str
    append_eod: bool
    holdout_fraction: float
    """Fraction of documents held out, in [0, 1)."""
    filters: Filters = field(default_factory=Filters)
    fast: bool = False
    """Use the tokenizer's fast engine, if it has one."""


class EnginesDiffer(RuntimeError):
    """Error: the fast engine gave other ids than the reference."""


@dataclass(frozen=True)
class Documents:
    """Encoded documents in order."""

    tokens: np.ndarray
    """uint16 or int32 [sum(lengths)]."""
    lengths: np.ndarray
    """int64 [documents]."""
    text_bytes: np.ndarray
    """int64 [documents], UTF-8 bytes of the text."""


@dataclass(frozen=True)
class Encoded:
    """Encoded chunk."""

    sides: tuple[Documents, ...]
    """Training documents, held-out documents."""
    rejects: list[Reject]
    left_out: dict[str, int]
    """Documents dropped by each filter."""
    read_bytes: int
    end: Cursor
    """Start of the next chunk."""

    @property
    def rows(self) -> int:
        """Return the number of documents in the chunk, including bad ones."""
        kept = sum(side.lengths.size for side in self.sides)
        return kept + len(self.rejects) + sum(self.left_out.values())


def encode_chunk(
    encoding: Encoding, chunk: Chunk, tokenizer: Tokenizer | None = None
) -> Encoded | LongChunk:
    """Parse a chunk, assign each document to a side, and encode both sides in batches.

    A document too long to hold in memory is returned unchanged, for ``long_documents``.
    ``tokenizer``: the tokenizer of ``encoding``, if already loaded.
    """
    if isinstance(chunk, LongChunk):
        return chunk
    tokenizer = tokenizer or open_tokenizer(encoding)
    sides: tuple[list[str], list[str]] = [], []
    rejects: list[Reject] = []
    left_out: Counter[str] = Counter(empty=0)
    for document in chunk.documents(encoding.text_key):
        if isinstance(document, Reject):
            rejects.append(document)
        elif (rule := encoding.filters.by_text(*document)) is not None:
            left_out[rule] += 1
        else:
            text = document[0]
            sides[is_held_out(text, encoding.holdout_fraction)].append(text)
    if isinstance(tokenizer, FastBPE):
        compare_engines(tokenizer, sides[0] or sides[1], chunk.size_bytes)
    training, held_out = (_encode(tokenizer, texts, encoding, left_out) for texts in sides)
    return Encoded((training, held_out), rejects, left_out, chunk.read_bytes, chunk.end)


def is_held_out(text: str | Iterable[str], fraction: float) -> bool:
    """Return whether a document, given as a string or in parts, is for validation.

    A keyed hash of its content decides, so that all copies of a text are on the same side in every
    run, and a smaller fraction holds out a subset of a larger one's.
    """
    if fraction == 0:
        return False
    digest = hashlib.blake2b(digest_size=8, person=b"moetron holdout")
    for part in (text,) if isinstance(text, str) else text:
        digest.update(part.encode())
    return int.from_bytes(digest.digest(), "little") < fraction * 2.0**64


def _encode(
    tokenizer: Tokenizer, texts: Sequence[str], encoding: Encoding, left_out: Counter[str]
) -> Documents:
    """Encode the texts that pass the filters; count the others in ``left_out``."""
    for name, caught in encoding.filters.by_words(texts):
        left_out[name] += int(np.count_nonzero(caught))
        texts = [text for text, drop in zip(texts, caught, strict=True) if not drop]
    dtype = token_dtype(tokenizer.vocab_size)
    parts = [_encode_part(tokenizer, part, dtype) for part in _parts(texts)]
    tokens = _joined([tokens for tokens, _ in parts], dtype)
    lengths = _joined([lengths for _, lengths in parts], np.dtype(np.int64))
    del parts  # may be gigabytes
    text_bytes = np.fromiter(map(_utf8_bytes, texts), np.int64, len(texts))
    passes = np.ones(lengths.size, bool)
    for name, caught in encoding.filters.by_tokens(tokens, lengths):
        left_out[name] += int(np.count_nonzero(passes & caught))
        passes &= ~caught
    if not passes.all():
        tokens, lengths = tokens[np.repeat(passes, lengths)], lengths[passes]
        text_bytes = text_bytes[passes]
    if encoding.append_eod:
        tokens, lengths = _with_eod(tokens, lengths, tokenizer.eod, dtype)
    return Documents(tokens.astype(dtype, copy=False), lengths, text_bytes)


def _with_eod(
    tokens: np.ndarray, lengths: np.ndarray, eod: int, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """Append ``eod`` to each document."""
    ends = np.cumsum(lengths) + np.arange(lengths.size)
    ended = np.empty(tokens.size + lengths.size, dtype)
    is_text = np.ones(ended.size, bool)
    is_text[ends] = False
    ended[is_text] = tokens
    ended[ends] = eod
    return ended, lengths + 1


def _joined(arrays: Sequence[np.ndarray], dtype: np.dtype) -> np.ndarray:
    """Concatenate arrays; return a single one unchanged, with its own dtype."""
    return arrays[0] if len(arrays) == 1 else np.concatenate([np.empty(0, dtype), *arrays])


def _utf8_bytes(text: str) -> int:
    """Return the length of a text in UTF-8 bytes."""
    return len(text) if text.isascii() else len(text.encode())


def _parts(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Yield long texts alone and other texts in groups."""
    for is_long, group in groupby(texts, lambda text: len(text) > PIECE_CHARACTERS):
        part = list(group)
        yield from ([text] for text in part) if is_long else [part]


def _encode_part(
    tokenizer: Tokenizer, texts: Sequence[str], dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """Return (tokens, lengths) of one long text, or of several others."""
    if len(texts[0]) <= PIECE_CHARACTERS:
        return tokenizer.encode_flat(texts)
    parts = pieces(blocks(texts[0]), tokenizer)
    ids = [tokenizer.encode_flat([piece])[0].astype(dtype) for piece in parts]
    tokens = np.concatenate(ids)
    return tokens, np.array([tokens.size])


def compare_engines(fast: FastBPE, texts: Sequence[str], size_bytes: int) -> None:
    """Compare the engines on a part of a text; which text and part depend on the chunk.

    Raises EnginesDiffer if the ids differ.
    """
    if not texts:
        return
    text = texts[len(texts[0]) % len(texts)]
    characters = max(COMPARED_CHARACTERS, int(size_bytes * COMPARED_FRACTION))
    start = max(0, len(text) - characters) * (len(texts) % 3) // 2  # beginning, middle or end
    if (piece := first_difference(fast, [text[start : start + characters]])) is not None:
        raise EnginesDiffer(f"{fast.name}: the fast engine encodes {piece[:80]!r}... differently")


def open_tokenizer(encoding: Encoding) -> Tokenizer:
    """Return the tokenizer of ``encoding``, or its fast engine; loaded once per process."""
    return _tokenizer(encoding.tokenizer, encoding.fast)


@lru_cache(maxsize=2)
def _tokenizer(source: str, fast: bool) -> Tokenizer:
    # There are as many workers as cores: HuggingFace's own threads would only compete with them.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    reference = load_tokenizer(source)
    return (open_fast(reference) if fast else None) or reference
