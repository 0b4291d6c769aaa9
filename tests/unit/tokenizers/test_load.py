"""Values of --tokenizer-model."""

from pathlib import Path

import pytest

from moetron.common.errors import UserError
from moetron.tokenizers.byte_level import ByteTokenizer
from moetron.tokenizers.load import load_tokenizer
from moetron.tokenizers.umt5 import SentencePieceTokenizer


def test_bytes_needs_no_file() -> None:
    assert isinstance(load_tokenizer("bytes"), ByteTokenizer)


def test_a_file_and_its_folder_are_the_same(model_path: Path) -> None:
    from_file, from_folder = load_tokenizer(model_path), load_tokenizer(model_path.parent)
    assert isinstance(from_file, SentencePieceTokenizer)
    assert from_file.fingerprint == from_folder.fingerprint


def test_mistakes_name_the_path_and_what_to_give(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("x")
    (tmp_path / "bad.model").write_bytes(b"\x00not a model")
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "empty").mkdir()
    for name, message in {
        "missing.model": "no such file",
        "text.txt": "ends with '.txt'",
        "bad.model": "not a SentencePiece model",
        "bad.json": "not JSON",
        "list.json": "not a JSON object",
        "empty": "no tokenizer in it",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            load_tokenizer(tmp_path / name)
        assert name in str(caught.value)


def test_two_models_in_a_folder_are_not_guessed(model: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.model").write_bytes(model)
    (tmp_path / "b.model").write_bytes(model)
    with pytest.raises(UserError, match=r"2 \.model files"):
        load_tokenizer(tmp_path)
