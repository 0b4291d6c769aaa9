"""The rule of frequent words against its definition."""

import sys
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetron.data.encoding.frequent_words import _is_space, frequent_words

WORDS = [
    "a",
    "b",
    "ab",
    "bb",
    "a,b",
    "x" * 255,
    "x" * 256,
    "x" * 300,
    "\u00e4",
    "\u6f22\u5b57",
    "\u200b",
    "\u3001",
    "\u00a1",
]
SPACES = [" ", "\n", "\t  ", *filter(str.isspace, map(chr, range(sys.maxunicode)))]


def by_definition(text: str) -> bool:
    """Return whether over 3 of 10 words are the same, or over 5 of 10 are one of two."""
    words = text.split()
    first, second, *_ = [*sorted(Counter(words).values(), reverse=True), 0, 0]
    if not words:
        return False
    shares = Fraction(first, len(words)), Fraction(first + second, len(words))
    return shares[0] > Fraction(3, 10) or shares[1] > Fraction(1, 2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", False),
        ("a a a b c d e f g h", False),  # 30 % exactly
        ("a a a a b c d e f g", True),
        ("a a a b b c d e f g", False),  # 50 % exactly
        ("a a a b b b c d e f", True),
    ],
)
def test_worked_examples(text: str, expected: bool) -> None:
    for before in ([], ["one two three four five"], [" "], ["\u00e4"]):
        assert frequent_words([*before, text])[-1] == expected
        assert frequent_words([text, *before])[0] == expected


@st.composite
def texts(draw: st.DrawFn) -> str:
    """Draw words of a few kinds, one or two possibly frequent, between any white space."""
    words = draw(st.lists(st.sampled_from(WORDS), max_size=12))
    rare = [f"{number}" for number in range(draw(st.integers(0, 12)))]
    words = draw(st.permutations(words + rare))
    spaces = SPACES[: draw(st.sampled_from([3, 12, len(SPACES)]))]
    between = draw(st.lists(st.sampled_from(spaces), min_size=len(words), max_size=len(words)))
    return "".join(word + space for word, space in zip(words, between, strict=True))


@settings(max_examples=300)
@given(st.lists(texts(), max_size=4))
def test_the_definition(some: list[str]) -> None:
    assert frequent_words(some).tolist() == [by_definition(text) for text in some]


def test_every_white_space_splits_and_nothing_else() -> None:
    for number in [*range(0xD800), *range(0xE000, 0x11000)]:
        data = np.frombuffer(f"a{chr(number)}b\n\n".encode(), np.uint8)
        inside = _is_space(data)[1:-3]
        assert inside.all() == inside.any() == chr(number).isspace(), hex(number)
