"""Texts too long to encode at once: cut where it does not change the ids.

A tokenizer's call holds several Python objects a token, and SentencePiece adds up the scores of a
whole text in float32, so that beyond some hundred thousand tokens it no longer finds the best
segmentation. Pieces bound the memory, and are segmented exactly.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import islice

from moetron.tokenizers.interface import Tokenizer

PIECE_CHARACTERS = 1 << 20
LONGEST_PIECES = 4
"""Without a safe place, a text is cut anyway where it is as long as so many pieces."""
CONTEXT_CHARACTERS = 256
"""Text on either side of a cut that must be encoded to the same ids with the cut and without."""
CANDIDATES = 32
_CANDIDATE = re.compile(r"\S(?=\s)")


def blocks(text: str) -> Iterator[str]:
    """A text in the form that ``pieces`` takes."""
    return (text[at : at + PIECE_CHARACTERS] for at in range(0, len(text), PIECE_CHARACTERS))


def pieces(text_blocks: Iterable[str], tokenizer: Tokenizer) -> Iterator[str]:
    """A text that comes in blocks, in pieces of about ``PIECE_CHARACTERS``.

    They are a function of the whole text and the tokenizer; how the blocks were cut does not count.
    """
    longest = LONGEST_PIECES * PIECE_CHARACTERS
    coming, text = filter(None, text_blocks), ""
    while True:
        while len(text) < longest + CONTEXT_CHARACTERS and (block := next(coming, "")):
            text += block
        if len(text) <= PIECE_CHARACTERS:
            break
        end = _safe_cut(text, tokenizer, min(longest, len(text)))
        yield text[:end]
        text = text[end:]
    if text:
        yield text


def _safe_cut(text: str, tokenizer: Tokenizer, end: int) -> int:
    """The first place from ``PIECE_CHARACTERS`` on where a cut leaves the ids as they are.

    ``end`` if none before it is found.
    """
    for match in islice(_CANDIDATE.finditer(text, PIECE_CHARACTERS, end), CANDIDATES):
        cut = match.end()
        left, right = text[cut - CONTEXT_CHARACTERS : cut], text[cut : cut + CONTEXT_CHARACTERS]
        whole, *parts = tokenizer.encode_batch([left + right, left, right])
        if whole == parts[0] + parts[1]:
            return cut
    return end
