"""Tokenizers from a HuggingFace tokenizer.json, made by its own library."""

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from moetron.common.errors import UserError
from moetron.tokenizers.huggingface import HuggingFaceTokenizer
from moetron.tokenizers.load import load_tokenizer


def save_bpe(folder: Path, corpus: list[str], specials: list[str]) -> Path:
    """Train a byte-level BPE of 400 ids, like GPT-NeoX's."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(corpus, trainer)
    path = folder / "tokenizer.json"
    made.save(str(path))
    return path


def test_ids_are_the_librarys_own(corpus: list[str], tmp_path: Path) -> None:
    path = save_bpe(tmp_path, corpus, ["<|endoftext|>", "<|padding|>"])
    loaded, theirs = load_tokenizer(tmp_path), tokenizers.Tokenizer.from_file(str(path))
    assert loaded.encode_batch(corpus) == [found.ids for found in theirs.encode_batch(corpus)]
    assert [loaded.decode(loaded.encode(text)) for text in corpus] == corpus
    assert (loaded.eod, loaded.pad, loaded.vocab_size) == (0, 1, 400)
    assert loaded.decode([*loaded.encode("a"), loaded.eod]) == "a"


@settings(deadline=None)
@given(data=st.binary())
def test_any_bytes_round_trip(reference: HuggingFaceTokenizer, data: bytes) -> None:
    """Encode bytes as characters of those numbers, which NFC does not change."""
    ids = reference.encode(data.decode("latin-1"))
    assert reference.decode(ids).encode("latin-1") == data


def test_config_beside_it_names_the_end(corpus: list[str], tmp_path: Path) -> None:
    path = save_bpe(tmp_path, corpus, ["<|endoftext|>", "<stop>"])
    before = HuggingFaceTokenizer(path)
    config = {"eos_token": {"content": "<stop>"}, "pad_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    after = HuggingFaceTokenizer(path)
    assert (before.eod, before.pad, after.eod, after.pad) == (0, 0, 1, 0)
    assert before.fingerprint != after.fingerprint


def test_fingerprint_ignores_layout_and_truncation(corpus: list[str], tmp_path: Path) -> None:
    path = save_bpe(tmp_path, corpus, ["<|endoftext|>"])
    before = HuggingFaceTokenizer(path)
    changed = tokenizers.Tokenizer.from_file(str(path))
    changed.enable_truncation(max_length=4)
    path.write_text(json.dumps(json.loads(changed.to_str()), indent=4))
    after = HuggingFaceTokenizer(path)
    assert after.fingerprint == before.fingerprint
    assert after.encode(corpus[0]) == before.encode(corpus[0])


def test_a_missing_end_token_is_an_error(corpus: list[str], tmp_path: Path) -> None:
    path = save_bpe(tmp_path, corpus, ["<stop>"])
    with pytest.raises(UserError, match=r"tokenizer_config\.json beside it"):
        HuggingFaceTokenizer(path)


def test_lone_surrogate_is_refused(corpus: list[str], tmp_path: Path) -> None:
    tokenizer = HuggingFaceTokenizer(save_bpe(tmp_path, corpus, ["</s>"]))
    with pytest.raises(UserError, match="lone surrogate"):
        tokenizer.encode("\udfff")
