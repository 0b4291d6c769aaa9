"""Text of tokens as they arrive: stop strings over token boundaries, streaming, end tokens."""

import pytest

from moetron.tokenizers.byte_level import ByteTokenizer
from moetron.tokenizers.decoded_text import DecodedText, ends_of
from moetron.tokenizers.interface import Tokenizer
from moetron.tokenizers.load import load_tokenizer
from moetron.tokenizers.umt5 import SentencePieceTokenizer
from tests.unit.tokenizers.kinds import START, write

BYTES = ByteTokenizer()


def _stream(tokenizer: Tokenizer, text: str, stops: list[str]) -> tuple[list[str], DecodedText]:
    """Return the parts that `settled` showed, the rest at last, and the text."""
    found, parts = DecodedText(tokenizer, stops), []
    for token in tokenizer.encode(text):
        found.add(token)
        parts.append(found.settled())
        if found.stopped:
            break
    return [*parts, found.rest()], found


@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        ([], "one two, three two"),
        (["two"], "one "),
        (["three", "two,"], "one "),
        (["o, t", "hre"], "one tw"),
        (["one two, three two."], "one two, three two"),
        (["one"], ""),
    ],
)
def test_text_ends_before_the_first_stop_string(stops: list[str], expected: str) -> None:
    """A token is a byte, so that every stop string but one lies across boundaries."""
    parts, found = _stream(BYTES, "one two, three two", stops)
    assert found.text == "".join(parts) == expected
    assert found.stopped == (expected != "one two, three two")


def test_pieces_of_several_characters(tokenizer: SentencePieceTokenizer) -> None:
    """A stop string that begins inside one piece and ends inside another."""
    text = "    return value\n\ndef following"
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode(text)]
    assert max(map(len, pieces)) > 3
    for stop in ("urn v", "e\n\nd", "\n"):
        assert stop == "\n" or not any(stop in piece for piece in pieces)
        parts, found = _stream(tokenizer, text, [stop])
        assert found.text == "".join(parts) == text[: text.index(stop)]


def test_what_may_begin_a_stop_string_or_a_character_waits() -> None:
    parts, _ = _stream(BYTES, "abc\u00e4b", ["bcd", "bx"])
    assert parts == ["a", "", "", "", "bc\u00e4", "", "b"]


def test_special_tokens_are_ends_and_other_texts_stop_strings(
    corpus: list[str], tmp_path: object
) -> None:
    made = load_tokenizer(write("template", tmp_path, corpus))  # type: ignore[arg-type]
    assert START in made.special_texts and made.id_of("a") is not None
    ends = ends_of([START, "a", made.end_text], made)
    assert ends.ids == {made.eod, made.id_of(START)} and ends.texts == ("a",)
    both = ends | ends_of(["b"], made)
    assert both.ids == ends.ids and both.texts == ("a", "b")
    assert ends_of([], BYTES).ids == {BYTES.eod}
