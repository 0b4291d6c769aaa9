"""Documents that are little but one or two words: a rule of OLMoE's for code."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

FIRST_WORD_SHARE, TWO_WORDS_SHARE = 0.3, 0.5
LENGTHS = 32
"""Lengths of words that are told apart; the last stands for longer ones too."""


def frequent_words(texts: Sequence[str]) -> np.ndarray:
    """Texts of which one word makes more than 30 %, or two words more than 50 %: bool [texts]."""
    found = np.zeros(len(texts), bool)
    plain = [number for number, text in enumerate(texts) if text.isascii()]
    looked_at = np.ones(len(texts), bool)
    looked_at[plain] = _suspects([texts[number] for number in plain])
    for number in np.flatnonzero(looked_at).tolist():
        found[number] = are_frequent(Counter(texts[number].split()))
    return found


def are_frequent(counts: Counter[str]) -> bool:
    """The rule of ``frequent_words``, for a text whose words were counted."""
    shares = [count / counts.total() for _, count in counts.most_common(2)]
    return bool(shares) and (shares[0] > FIRST_WORD_SHARE or sum(shares) > TWO_WORDS_SHARE)


def _suspects(texts: Sequence[str]) -> np.ndarray:
    """ASCII texts that a rough look does not rule out: bool [texts].

    What the rule catches has a word that makes more than a quarter. So one kind of word (length,
    first and last character) does, and among a text's kinds in order two that lie a quarter of its
    words apart are the same.
    """
    joined = np.frombuffer("\n".join(["", *texts, ""]).encode("ascii"), np.uint8)
    is_space = (joined - 9 <= 4) | (joined - 28 <= 4)  # of ASCII, what str.split splits at
    edges = np.flatnonzero(np.diff(is_space))
    starts, ends = edges[::2] + 1, edges[1::2]  # of each word, both its own
    lengths = np.minimum(ends - starts + 1, LENGTHS) - 1
    text_ends = np.cumsum([len(text) + 1 for text in texts])
    words = np.diff(np.searchsorted(starts, text_ends), prepend=0)
    text = np.repeat(np.arange(len(texts)), words)
    kinds = (text << 21) + (lengths << 16) + (joined[starts].astype(int) << 8) + joined[ends]
    kinds.sort()
    apart = np.arange(kinds.size) + np.repeat(words // 4, words)
    same = kinds == kinds.take(apart, mode="clip")
    suspects = np.zeros(len(texts), bool)
    suspects[text[same]] = True
    return suspects
