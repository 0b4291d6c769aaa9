"""Texts too long to encode at once: cut where it does not change the ids.

A tokenizer's call holds several Python objects a token, and SentencePiece adds up the scores of a
whole text in float32, so that beyond some hundred thousand tokens it no longer finds the best
segmentation. Pieces bound the memory, and are segmented exactly.
"""

import re
from collections.abc import Iterator
from itertools import islice

from moetron.tokenizers.interface import Tokenizer

PIECE_CHARACTERS = 1 << 20
CONTEXT_CHARACTERS = 256
"""Text on either side of a cut that must be encoded to the same ids with the cut and without."""
CANDIDATES = 32
_CANDIDATE = re.compile(r"\w(?=\s\w)")


def pieces(text: str, tokenizer: Tokenizer) -> Iterator[str]:
    """``text`` in pieces, a function of it and the tokenizer alone.

    Pieces are of about ``PIECE_CHARACTERS``; a text in which no safe cut is found stays whole.
    """
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        end = _safe_cut(text, start + PIECE_CHARACTERS, tokenizer)
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def _safe_cut(text: str, earliest: int, tokenizer: Tokenizer) -> int:
    """The first place, from ``earliest`` on, where a cut leaves the ids around it as they are."""
    for match in islice(_CANDIDATE.finditer(text, earliest), CANDIDATES):
        cut = match.end()
        left, right = text[cut - CONTEXT_CHARACTERS : cut], text[cut : cut + CONTEXT_CHARACTERS]
        whole, *parts = tokenizer.encode_batch([left + right, left, right])
        if whole == parts[0] + parts[1]:
            return cut
    return len(text)
