"""HuggingFace's BPE through gigatoken, many times as fast, where it is proved to give the same ids.

gigatoken (PyPI, the extra ``fast``) reads the same ``tokenizer.json``. HuggingFace's library stays
the reference: an engine that differs from it on one of the probes is not used, and who encodes a
corpus compares the two on a sample of it (``first_difference``).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import numpy as np

from moetron.tokenizers.huggingface import HuggingFaceTokenizer
from moetron.tokenizers.interface import Tokenizer, require_encodable

PROBES = (
    "Hello, world!  It's 12:34,\tand I'll go\r\n\n   now.   ",
    "def f(x):\n        return x**2  # \u00e4\u00f6\u00fc\n" + "    " * 9,
    "e\u0301 \ufb01 \uff21 \u212b \u1e9b\u0323 \u0344",  # what Unicode normalisation changes
    "\u6f22\u5b57\u4eee\u540d \ud55c\uad6d\uc5b4 \u0939\u093f\u0928\u094d\u0926\u0940",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f600\u00a0\u2003\u200b\u0000\u0085",
    "<|endoftext|> </s> <s><pad> |||EMAIL_ADDRESS||| <|padding|>x",
    "",
    " ",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa 111111111111111111111 ........",
)


class FastBPE(Tokenizer):
    """A HuggingFace tokenizer whose ids gigatoken computes.

    Threads may encode at the same time, each with an engine of its own: an engine remembers the
    words that it has seen, behind a lock.
    """

    kind = HuggingFaceTokenizer.kind
    concurrent = True

    def __init__(self, reference: HuggingFaceTokenizer, threads: int = 1) -> None:
        """Make the engines of so many threads; a further thread waits for its own to be made.

        Raises whatever gigatoken raises for a tokenizer that it does not know.
        """
        self.reference = reference
        self.name, self.fingerprint = reference.name, reference.fingerprint
        self.vocab_size, self.sentinels = reference.vocab_size, reference.sentinels
        self.eod, self.pad = reference.eod, reference.pad
        definition = reference.definition
        self._idle = [_make_engine(definition) for _ in range(threads)]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        require_encodable(texts)
        with self._engine() as engine:
            lists: list[list[int]] = engine.encode_batch_list(list(texts), parallel=False)
        return lists

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts one after the other, uint32, and their lengths."""
        try:
            with self._engine() as engine:
                rows = engine.encode_batch(list(texts), parallel=False).layout
        except TypeError:
            require_encodable(texts)
            raise
        offsets = np.asarray(rows.offsets.data, np.int64)
        return np.asarray(rows.content.data)[offsets[0] : offsets[-1]], np.diff(offsets)

    @contextmanager
    def _engine(self) -> Iterator[Any]:
        """An engine that no other thread uses."""
        try:
            engine = self._idle.pop()
        except IndexError:
            engine = _make_engine(self.reference.definition)
        try:
            yield engine
        finally:
            self._idle.append(engine)

    def id_of(self, token: str) -> int | None:
        """The reference's."""
        return self.reference.id_of(token)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, as the reference gives it."""
        return self.reference.decode(ids)


def open_fast(tokenizer: Tokenizer, threads: int = 1) -> FastBPE | None:
    """The fast engine of a tokenizer, if there is one and it agrees on the probes."""
    if not isinstance(tokenizer, HuggingFaceTokenizer) or not _installed():
        return None
    try:
        fast = FastBPE(tokenizer, threads)
    except Exception:  # of many types: the engine does not know this tokenizer
        return None
    return fast if first_difference(fast, PROBES) is None else None


def first_difference(fast: FastBPE, texts: Sequence[str]) -> str | None:
    """The first text that the engine and the reference encode differently."""
    pairs = zip(fast.encode_batch(texts), fast.reference.encode_batch(texts), strict=True)
    return next((text for text, (a, b) in zip(texts, pairs, strict=True) if a != b), None)


def _make_engine(definition: str) -> Any:
    """One of gigatoken's tokenizers, from a ``tokenizer.json``."""
    import gigatoken

    return gigatoken.Tokenizer.from_json(definition)


def _installed() -> bool:
    """Whether gigatoken is there."""
    try:
        metadata.version("gigatoken")
    except metadata.PackageNotFoundError:
        return False
    return True
