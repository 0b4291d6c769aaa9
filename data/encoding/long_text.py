"""Texts too long to encode at once: split where it does not change the ids.

A tokenizer call uses several Python objects a token, and SentencePiece adds up the scores of a
whole text in float32, so that beyond some hundred thousand tokens it no longer finds the best
segmentation. Pieces bound the memory and are segmented exactly.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import islice

from moetron.tokenizers.interface import Tokenizer

PIECE_CHARACTERS = 1 << 20
LONGEST_PIECES = 4
"""Maximum length in pieces: without a safe position, the text is split there anyway."""
CONTEXT_CHARACTERS = 256
"""Text on either side of a split whose ids must be the same with and without the split."""
CANDIDATES = 32
_CANDIDATE = re.compile(r"\S(?=\s)")


def blocks(text: str) -> Iterator[str]:
    """Return a text as blocks for ``pieces``."""
    return (text[at : at + PIECE_CHARACTERS] for at in range(0, len(text), PIECE_CHARACTERS))


def pieces(text_blocks: Iterable[str], tokenizer: Tokenizer) -> Iterator[str]:
    """Split a text, given in blocks, into pieces of about ``PIECE_CHARACTERS``.

    The pieces depend only on the text and the tokenizer, not on the block boundaries.
    """
    longest = LONGEST_PIECES * PIECE_CHARACTERS
    remaining, text = filter(None, text_blocks), ""
    while True:
        while len(text) < longest + CONTEXT_CHARACTERS and (block := next(remaining, "")):
            text += block
        if len(text) <= PIECE_CHARACTERS:
            break
        end = _safe_split(text, tokenizer, min(longest, len(text)))
        yield text[:end]
        text = text[end:]
    if text:
        yield text


def _safe_split(text: str, tokenizer: Tokenizer, end: int) -> int:
    """Return the first position from ``PIECE_CHARACTERS`` where a split keeps the ids.

    Returns ``end`` if there is none before it.
    """
    for match in islice(_CANDIDATE.finditer(text, PIECE_CHARACTERS, end), CANDIDATES):
        at = match.end()
        left, right = text[at - CONTEXT_CHARACTERS : at], text[at : at + CONTEXT_CHARACTERS]
        unsplit, *parts = tokenizer.encode_batch([left + right, left, right])
        if unsplit == parts[0] + parts[1]:
            return at
    return end
