"""What the rest of Moetron asks of a tokenizer."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from moetron.common.errors import UserError


class Tokenizer(ABC):
    """Text to token ids and back; no document markers are added on the way.

    The ids of a document are those of its text alone; who writes documents one after the other
    appends ``eod`` to each. Text without lone surrogates is the only input (``UserError``).
    """

    kind: str
    """Which implementation reads the file: ``sentencepiece``, ``huggingface`` or ``bytes``."""
    name: str
    """For people: the file's or folder's name."""
    vocab_size: int
    """Ids are below this; the padding that the file itself holds is included."""
    eod: int
    """Id that ends a document."""
    pad: int
    """Id that fills up a sample; equal to ``eod`` where the file names none."""
    sentinels: tuple[int, ...]
    """Ids of ``<extra_id_0>``, ``<extra_id_1>``, ... in this order; empty where there are none."""
    concurrent = False
    """Whether threads can encode at the same time: its library lets go of Python's lock."""
    files: Mapping[str, Path] = {}
    """Where the files lie that it is read from, by their names in a folder that
    `load_tokenizer` reads as the same tokenizer; empty where it needs none."""
    fingerprint: str
    """64 hexadecimal digits: equal fingerprints give equal ids."""

    def encode(self, text: str) -> list[int]:
        """Ids of one text."""
        return self.encode_batch([text])[0]

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts: the library's batch call, on one thread where it lets us choose."""

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """What ``encode_batch`` gives, without a Python object a token.

        Returns the ids of all texts one after the other, an integer dtype [sum of lengths], and
        their lengths, int64 [texts].
        """
        ids = self.encode_batch(texts)
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        return np.fromiter(chain.from_iterable(ids), np.int32, int(lengths.sum())), lengths

    @abstractmethod
    def id_of(self, token: str) -> int | None:
        """Id of the one token that is written so; None if there is none."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; markers such as ``eod`` are dropped, broken UTF-8 becomes U+FFFD."""


def fingerprint_of(kind: str, content: bytes) -> str:
    """SHA-256 over the kind and the canonical content of a tokenizer's file, in hexadecimal."""
    return hashlib.sha256(kind.encode() + b"\n" + content).hexdigest()


def require_encodable(texts: Sequence[str]) -> None:
    """Refuse text that UTF-8 cannot hold (a lone surrogate), naming text and position."""
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
