"""One task of preprocessing: raw rows to token ids."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import numpy as np

from moetron.data.indexed_format import token_dtype
from moetron.data.inputs import Chunk, Cursor, Reject
from moetron.tokenizers.interface import Tokenizer
from moetron.tokenizers.load import load_tokenizer


@dataclass(frozen=True)
class Encoding:
    """How text becomes documents of tokens."""

    tokenizer: str
    """What ``load_tokenizer`` takes."""
    text_key: str
    append_eod: bool
    holdout_fraction: float
    """Share of documents that is held out, in [0, 1)."""


@dataclass(frozen=True)
class Documents:
    """Encoded documents, one after the other."""

    tokens: np.ndarray
    """uint16 or int32 [sum(lengths)]."""
    lengths: np.ndarray
    """int64 [documents]."""
    text_bytes: int


@dataclass(frozen=True)
class Encoded:
    """What one chunk gave."""

    sides: tuple[Documents, Documents]
    """For training, held out."""
    rejects: list[Reject]
    left_out: dict[str, int]
    """Documents that each filter left out."""
    read_bytes: int
    end: Cursor
    """Where the next chunk begins."""

    @property
    def rows(self) -> int:
        """Documents that the chunk held, bad ones included."""
        kept = sum(side.lengths.size for side in self.sides)
        return kept + len(self.rejects) + sum(self.left_out.values())


def encode_chunk(encoding: Encoding, chunk: Chunk) -> Encoded:
    """Parse a chunk, decide each document's side, and encode both sides in batches."""
    tokenizer = _tokenizer(encoding.tokenizer)
    sides: tuple[list[str], list[str]] = [], []
    rejects: list[Reject] = []
    left_out = {"empty": 0}
    for text in chunk.texts(encoding.text_key):
        if isinstance(text, Reject):
            rejects.append(text)
        elif not text:
            left_out["empty"] += 1
        else:
            sides[is_held_out(text, encoding.holdout_fraction)].append(text)
    training, held_out = (_encode(tokenizer, texts, encoding.append_eod) for texts in sides)
    return Encoded((training, held_out), rejects, left_out, chunk.read_bytes, chunk.end)


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document is for validation.

    A keyed hash of its content decides, so that the same text falls on the same side in every run
    and every copy of it does, and a smaller fraction holds out a subset of a larger one's.
    """
    if fraction == 0:
        return False
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"moetron holdout").digest()
    return int.from_bytes(digest, "little") < fraction * 2.0**64


def _encode(tokenizer: Tokenizer, texts: Sequence[str], append_eod: bool) -> Documents:
    """Token ids of texts."""
    ids = tokenizer.encode_batch(texts) if texts else []
    if append_eod:
        for document in ids:
            document.append(tokenizer.eod)
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    dtype = token_dtype(tokenizer.vocab_size)
    tokens = np.fromiter(chain.from_iterable(ids), dtype, int(lengths.sum()))
    return Documents(tokens, lengths, sum(len(text.encode()) for text in texts))


@lru_cache(maxsize=1)
def _tokenizer(source: str) -> Tokenizer:
    """The tokenizer, loaded once a process."""
    return load_tokenizer(source)
