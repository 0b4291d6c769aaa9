"""Tokenizers under HuggingFace's AutoTokenizer."""

from pathlib import Path

import pytest

from moetron.common.errors import UserError
from moetron.tokenizers.byte_level import ByteTokenizer
from moetron.tokenizers.export import export
from moetron.tokenizers.huggingface import HuggingFaceTokenizer
from moetron.tokenizers.interface import Tokenizer
from moetron.tokenizers.load import load_tokenizer
from moetron.tokenizers.umt5 import SentencePieceTokenizer

transformers = pytest.importorskip("transformers")
TEXTS = ["", " ", "a  b\n\n\tc" + " " * 39 + "d", "naïve 漢字 \x00 😀", "<extra_id_3> <0x41>  end "]


def loaded(tokenizer: Tokenizer, folder: Path) -> tuple[object, list[list[int]]]:
    export(tokenizer, folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert theirs.bos_token_id == theirs.eos_token_id == tokenizer.eod
    assert theirs.pad_token_id == tokenizer.pad
    return theirs, [theirs.encode(text, add_special_tokens=False) for text in TEXTS]


def test_a_sentencepiece_model_gives_the_same_ids(
    tokenizer: SentencePieceTokenizer, corpus: list[str], tmp_path: Path
) -> None:
    theirs, ids = loaded(tokenizer, tmp_path)
    assert ids == tokenizer.encode_batch(TEXTS)
    for text in corpus[:3]:
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint


def test_a_tokenizer_json_gives_the_same_ids(
    reference: HuggingFaceTokenizer, corpus: list[str], tmp_path: Path
) -> None:
    theirs, ids = loaded(reference, tmp_path)
    assert ids == reference.encode_batch(TEXTS)
    for text in corpus:
        assert theirs.encode(text, add_special_tokens=False) == reference.encode(text)
    again = load_tokenizer(tmp_path)
    assert (again.eod, again.pad) == (reference.eod, reference.pad)
    assert again.encode_batch(TEXTS) == ids


def test_bytes_have_no_counterpart(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="bytes: AutoTokenizer knows nothing"):
        export(ByteTokenizer(), tmp_path)
