"""The byte tokenizer."""

from hypothesis import given
from hypothesis import strategies as st

from moetron.tokenizers.byte_level import ByteTokenizer


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_ids_are_utf8_bytes(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert bytes(ids) == text.encode()
    assert tokenizer.decode([*ids, tokenizer.eod, tokenizer.pad, *tokenizer.sentinels]) == text


def test_every_id_has_one_meaning() -> None:
    tokenizer = ByteTokenizer()
    ids = [*range(256), tokenizer.eod, tokenizer.pad, *tokenizer.sentinels]
    assert sorted(ids) == list(range(tokenizer.vocab_size))
    assert tokenizer.sentinels[0] == tokenizer.vocab_size - 1


def test_invalid_utf8_is_replaced() -> None:
    assert ByteTokenizer().decode([0xE2, 0x82, 65]) == "\ufffdA"
