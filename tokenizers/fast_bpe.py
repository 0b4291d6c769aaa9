"""HuggingFace's BPE with gigatoken, many times as fast, where it gives the same ids.

gigatoken (PyPI, the extra ``fast``) reads the same ``tokenizer.json``. HuggingFace's library stays
the reference: an engine that differs from it on a probe is not used, and preprocessing compares
the two on a sample of the corpus (``first_difference``).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from moetron.common.packages import installed_version
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


PROCESS_BYTES = 1 << 30
"""Memory of the process per encoding thread, above which engines are replaced."""
REPLACED_CHARACTERS = 1 << 26
"""Minimum text of an engine before it is replaced, because a new one starts with no words."""


class FastBPE(Tokenizer):
    """HuggingFace tokenizer that computes ids with gigatoken.

    Threads may encode at the same time, each with its own engine: an engine caches the words that
    it has seen, behind a lock and without bound, up to ten bytes for one of text. Engines that
    have grown too large are dropped.
    """

    kind = HuggingFaceTokenizer.kind
    concurrent = True

    def __init__(self, reference: HuggingFaceTokenizer, threads: int = 1) -> None:
        """Create ``threads`` engines; a further thread creates its own on demand.

        Raises whatever gigatoken raises for an unsupported tokenizer.
        """
        self.reference = reference
        self.name, self.fingerprint = reference.name, reference.fingerprint
        self.vocab_size, self.sentinels = reference.vocab_size, reference.sentinels
        self.eod, self.pad, self.files = reference.eod, reference.pad, reference.files
        self.end_text, self.special_texts = reference.end_text, reference.special_texts
        self._definition, self._threads = reference.definition, threads
        self._idle = [_Engine(self._definition) for _ in range(threads)]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text."""
        require_encodable(texts)
        with self._engine(texts) as engine:
            lists: list[list[int]] = engine.encode_batch_list(list(texts), parallel=False)
        return lists

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the concatenated ids of all texts, uint32, and their lengths."""
        try:
            with self._engine(texts) as engine:
                rows = engine.encode_batch(list(texts), parallel=False).layout
        except TypeError:
            require_encodable(texts)
            raise
        offsets = np.asarray(rows.offsets.data, np.int64)
        return np.asarray(rows.content.data)[offsets[0] : offsets[-1]], np.diff(offsets)

    @contextmanager
    def _engine(self, texts: Sequence[str]) -> Iterator[Any]:
        """Yield an engine for these texts, not used by others meanwhile."""
        try:
            engine = self._idle.pop()
        except IndexError:
            engine = _Engine(self._definition)
        try:
            yield engine.tokenizer
        finally:
            engine.characters += sum(map(len, texts))
            if engine.characters < REPLACED_CHARACTERS or not self._too_large():
                self._idle.append(engine)

    def _too_large(self) -> bool:
        """Return whether the process exceeds its memory limit."""
        import psutil  # imported here: rarely needed and slow to load

        return psutil.Process().memory_info().rss > self._threads * PROCESS_BYTES

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[int], list[int]]:
        """Return the reference's ids and places."""
        return self.reference.encode_with_offsets(text)

    def id_of(self, token: str) -> int | None:
        """Return the reference's id of a token."""
        return self.reference.id_of(token)

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids with the reference."""
        return self.reference.decode(ids)


def open_fast(tokenizer: Tokenizer, threads: int = 1) -> FastBPE | None:
    """Return the fast engine of a tokenizer, if it exists and agrees on the probes."""
    if not isinstance(tokenizer, HuggingFaceTokenizer) or not installed_version("gigatoken"):
        return None
    try:
        fast = FastBPE(tokenizer, threads)
    except Exception:  # of many types: unsupported tokenizer
        return None
    return fast if first_difference(fast, PROBES) is None else None


def first_difference(fast: FastBPE, texts: Sequence[str]) -> str | None:
    """Return the first text that the engine and the reference encode differently, or None."""
    pairs = zip(fast.encode_batch(texts), fast.reference.encode_batch(texts), strict=True)
    return next((text for text, (a, b) in zip(texts, pairs, strict=True) if a != b), None)


class _Engine:
    """Tokenizer of gigatoken with the number of characters that it has encoded."""

    def __init__(self, definition: str) -> None:
        """Create it from a ``tokenizer.json``."""
        import gigatoken

        self.tokenizer: Any = gigatoken.Tokenizer.from_json(definition)
        self.characters = 0
