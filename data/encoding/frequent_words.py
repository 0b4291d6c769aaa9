"""Find documents dominated by one or two words: a rule of OLMoE's for code."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

FIRST_WORD, TWO_WORDS = 0.3, 0.5
LENGTHS = 256
"""Word lengths distinguished, in bytes; the last includes longer ones."""


def frequent_words(texts: Sequence[str]) -> np.ndarray:
    """Find texts where one word is over 30 % of all words, or two over 50 %: bool [texts]."""
    found = _suspects(texts)
    for number in np.flatnonzero(found).tolist():
        found[number] = are_frequent(Counter(texts[number].split()))
    return found


def are_frequent(counts: Counter[str]) -> bool:
    """Apply the rule of ``frequent_words`` to the word counts of a text."""
    fractions = [count / counts.total() for _, count in counts.most_common(2)]
    return bool(fractions) and (fractions[0] > FIRST_WORD or sum(fractions) > TWO_WORDS)


def _suspects(texts: Sequence[str]) -> np.ndarray:
    """Find texts that a cheap test does not rule out: bool [texts].

    Texts that the rule matches have a word with over a quarter of all words. So one word class
    (length, second byte, last two) has, and among a text's sorted classes two that are a quarter of
    its words apart are equal.
    """
    parts = [text.encode() for text in texts]
    joined = np.frombuffer(b"\n".join([b"", *parts, b"\n"]), np.uint8)
    edges = np.flatnonzero(np.diff(_is_space(joined)))
    starts, ends = edges[::2] + 1, edges[1::2]  # first and last byte of each word
    lengths = np.minimum(ends - starts, LENGTHS - 1)
    text_ends = np.cumsum([len(part) + 1 for part in parts])
    words = np.diff(np.searchsorted(starts, text_ends), prepend=0)
    text = np.repeat(np.arange(len(texts)), words)
    kinds = (text << 32) + (lengths << 24) + joined[ends]
    kinds += joined[np.minimum(starts + 1, ends)].astype(int) << 16
    kinds += joined[np.maximum(ends - 1, starts)].astype(int) << 8
    kinds.sort()
    apart = np.arange(kinds.size) + np.repeat(words // 4, words)
    same = kinds == kinds.take(apart, mode="clip")
    suspects = np.zeros(len(texts), bool)
    suspects[text[same]] = True
    return suspects


def _is_space(utf8: np.ndarray) -> np.ndarray:
    """Find bytes of characters at which ``str.split`` splits: uint8 [bytes], at least 2 -> bool."""
    found: np.ndarray = (utf8 - 9 <= 4) | (utf8 - 28 <= 4)
    if utf8.max() < 0x80:
        return found
    a, b, c = utf8[:-2], utf8[1:-1], utf8[2:]
    two = (a == 0xC2) & ((b == 0x85) | (b == 0xA0))
    three = (a == 0xE2) & (b == 0x80) & ((c <= 0x8A) | (c - 0xA8 <= 1) | (c == 0xAF))
    three |= (a == 0xE2) & (b == 0x81) & (c == 0x9F)
    three |= (a == 0xE1) & (b == 0x9A) & (c == 0x80)
    three |= (a == 0xE3) & (b == 0x80) & (c == 0x80)
    found[2:] |= three
    three |= two
    found[:-2] |= three
    found[1:-1] |= three
    return found
