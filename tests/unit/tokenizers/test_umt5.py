"""SentencePiece models trained here: lossless, with umT5's id layout."""

from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from moetron.common.errors import UserError
from moetron.tokenizers.train import TrainingOptions, append_pieces, model_pb2, train
from moetron.tokenizers.umt5 import SentencePieceTokenizer

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
UNUSUAL = tuple("\u2581\u2585 \n\t\0\r\ufeff\ufffd\U0010ffff")
MARKUP = ("<extra_id_0>", "</s>", "<pad>", "<unk>", "<s>", "<0x41>", "def f(x):", "字")
AWKWARD = st.lists(st.sampled_from(UNUSUAL + MARKUP)).map("".join)


@settings(max_examples=300, deadline=None)
@given(text=TEXT | AWKWARD)
def test_any_text_round_trips(tokenizer: SentencePieceTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


@settings(max_examples=100, deadline=None)
@given(text=TEXT | AWKWARD)
def test_text_never_gives_markers(tokenizer: SentencePieceTokenizer, text: str) -> None:
    assert not set(tokenizer.encode(text)) & {tokenizer.pad, tokenizer.eod, 2, 3}


@settings(max_examples=50, deadline=None)
@given(texts=st.lists(TEXT | AWKWARD, max_size=5))
def test_a_batch_is_its_texts(tokenizer: SentencePieceTokenizer, texts: list[str]) -> None:
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_ids_have_the_layout_of_umt5(tokenizer: SentencePieceTokenizer, model: bytes) -> None:
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert [pieces.id_to_piece(i) for i in range(4)] == ["<pad>", "</s>", "<s>", "<unk>"]
    assert (tokenizer.pad, tokenizer.eod) == (0, 1)
    assert tokenizer.vocab_size == 1024
    assert tokenizer.sentinels == tuple(range(999, 979, -1))
    assert pieces.id_to_piece(999) == "<extra_id_0>"
    assert pieces.id_to_piece(980) == "<extra_id_19>"
    assert all(pieces.is_control(i) for i in range(1000, 1024))


def test_three_hundred_sentinels_follow_256_000_pieces(corpus: list[str]) -> None:
    """umT5: <extra_id_0> is 256,299, <extra_id_299> is 256,000, and there are 256,384 rows."""
    proto = model_pb2.ModelProto.FromString(
        train(corpus, TrainingOptions(900, sentinels=0, padding_multiple=1))
    )
    for number in range(256_000 - len(proto.pieces)):
        proto.pieces.add(piece=f"word{number}", score=-99.0)
    grown = append_pieces(proto.SerializeToString(), 300, 128)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=grown)
    ids = [pieces.piece_to_id(f"<extra_id_{number}>") for number in (0, 1, 299)]
    assert ids == [256_299, 256_298, 256_000]
    assert pieces.get_piece_size() == 256_384


@pytest.mark.parametrize(
    ("text", "count"), [("\n", 1), ("\n\n", 1), (" " * 8, 1), (" " * 16, 1), ("\t\t", 1)]
)
def test_white_space_is_one_piece(tokenizer: SentencePieceTokenizer, text: str, count: int) -> None:
    assert len(tokenizer.encode(text)) == count


def test_padding_and_markers_decode_to_nothing(tokenizer: SentencePieceTokenizer) -> None:
    ids = tokenizer.encode("abc")
    assert tokenizer.decode([*ids, tokenizer.eod, tokenizer.pad, 1001]) == "abc"


def test_training_is_deterministic(corpus: list[str], model: bytes) -> None:
    assert train(corpus, TrainingOptions(vocab_size=1000, sentinels=20)) == model


def test_digits_can_be_split(corpus: list[str], tmp_path: Path) -> None:
    path = tmp_path / "digits.model"
    numbers = [" ".join(str(2000 + year) for year in range(30))] * 50
    path.write_bytes(train(corpus + numbers, TrainingOptions(900, sentinels=0, split_digits=True)))
    tokenizer = SentencePieceTokenizer(path)
    assert tokenizer.sentinels == ()
    assert len(tokenizer.encode("2024")) == 4


def test_lone_surrogate_is_refused(tokenizer: SentencePieceTokenizer) -> None:
    with pytest.raises(UserError, match=r"text 1 .* lone surrogate .* character 2"):
        tokenizer.encode_batch(["fine", "ab\ud800"])


def test_wrong_options_are_all_named() -> None:
    with pytest.raises(UserError, match=r"--vocab-size 300.*--character-coverage 0\.5"):
        train(["text"], TrainingOptions(vocab_size=300, character_coverage=0.5))


def test_too_little_text_is_an_error() -> None:
    with pytest.raises(UserError, match="give more text or a smaller vocabulary"):
        train(["a short text"], TrainingOptions(vocab_size=4000))


def test_fingerprint_follows_the_content(
    corpus: list[str], model: bytes, model_path: Path, tmp_path: Path
) -> None:
    same, other = tmp_path / "same.model", tmp_path / "other.model"
    same.write_bytes(model)
    other.write_bytes(train(corpus, TrainingOptions(900, sentinels=0, padding_multiple=1)))
    fingerprint = SentencePieceTokenizer(model_path).fingerprint
    assert SentencePieceTokenizer(same).fingerprint == fingerprint
    assert SentencePieceTokenizer(other).fingerprint != fingerprint
