"""Interface of tokenizers."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from moetron.common.errors import UserError


class Tokenizer(ABC):
    """Map between text and token ids, without document markers.

    The ids of a document are those of its text alone; writers of consecutive documents append
    ``eod`` to each. Text with lone surrogates is rejected (``UserError``).
    """

    kind: str
    """Implementation that reads the file: ``sentencepiece``, ``huggingface`` or ``bytes``."""
    name: str
    """Display name: the file's or folder's name."""
    vocab_size: int
    """Exclusive upper bound of the ids, including padding in the file."""
    eod: int
    """End-of-document id."""
    pad: int
    """Padding id; equal to ``eod`` if the file names none."""
    sentinels: tuple[int, ...]
    """Ids of ``<extra_id_0>``, ``<extra_id_1>``, ... in this order; may be empty."""
    end_text: str
    """Spelling of the end-of-document token."""
    special_texts: tuple[str, ...] = ()
    """Spellings of further tokens that a text must not spell, for it would become them."""
    concurrent = False
    """True if threads can encode at the same time: the library releases Python's lock."""
    files: Mapping[str, Path] = {}
    """Paths of its files by their names in a folder that `load_tokenizer` reads as the same
    tokenizer; empty if it needs none."""
    fingerprint: str
    """64 hexadecimal digits: equal fingerprints give equal ids."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of one text."""
        return self.encode_batch([text])[0]

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of many texts with the library's batch call, on one thread if possible."""

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encode like ``encode_batch``, without a Python object a token.

        Returns the concatenated ids of all texts, an integer dtype [sum of lengths], and their
        lengths, int64 [texts].
        """
        ids = self.encode_batch(texts)
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        return np.fromiter(chain.from_iterable(ids), np.int32, int(lengths.sum())), lengths

    @abstractmethod
    def encode_with_offsets(self, text: str) -> tuple[list[int], list[int], list[int]]:
        """Return the ids of a text, and each token's first character and end in it.

        A character of several tokens belongs to all of them.
        """

    @abstractmethod
    def id_of(self, token: str) -> int | None:
        """Return the id of the token spelled ``token``; None if there is none."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids; drop markers such as ``eod`` and replace invalid UTF-8 with U+FFFD."""


def fingerprint_of(kind: str, content: bytes) -> str:
    """Return the SHA-256 of a tokenizer file's kind and canonical content, in hexadecimal."""
    return hashlib.sha256(kind.encode() + b"\n" + content).hexdigest()


def require_encodable(texts: Sequence[str]) -> None:
    """Raise UserError for text with a lone surrogate, naming text and position."""
    for number, text in enumerate(texts):
        if text.isascii():
            continue
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"text {number} of the batch holds the lone surrogate {text[error.start]!r} at "
                f"character {error.start}; decode its source with errors='replace'"
            ) from None
