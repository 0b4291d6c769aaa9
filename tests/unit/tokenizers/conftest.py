"""One tiny trained tokenizer for all tests of this folder."""

import json
import keyword
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from moetron.tokenizers.huggingface import HuggingFaceTokenizer
from moetron.tokenizers.train import TrainingOptions, train
from moetron.tokenizers.umt5 import SentencePieceTokenizer

OPTIONS = TrainingOptions(vocab_size=1000, sentinels=20)


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    """Return a third of a megabyte of real Python."""
    folder = Path(json.__file__).parent
    files = [*sorted(folder.glob("*.py")), Path(keyword.__file__)]
    return [path.read_text(encoding="utf-8") for path in files]


@pytest.fixture(scope="session")
def model(corpus: list[str]) -> bytes:
    return train(corpus, OPTIONS)


@pytest.fixture(scope="session")
def model_path(model: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tiny.model"
    path.write_bytes(model)
    return path


@pytest.fixture(scope="session")
def tokenizer(model_path: Path) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(model_path)


@pytest.fixture(scope="session")
def reference(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceTokenizer:
    """Train NeoX's kind: byte level, NFC, an end token, runs of spaces as added tokens."""
    model = tokenizers.Tokenizer(models.BPE())
    model.normalizer = normalizers.NFC()
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(corpus[:2], trainer)
    model.add_tokens([tokenizers.AddedToken(" " * n, normalized=True) for n in range(2, 9)])
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    model.save(str(path))
    return HuggingFaceTokenizer(path)
