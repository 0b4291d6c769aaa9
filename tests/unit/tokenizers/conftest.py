"""One tiny trained tokenizer for all tests of this folder."""

import json
import keyword
from pathlib import Path

import pytest

from moetron.tokenizers.train import TrainingOptions, train
from moetron.tokenizers.umt5 import SentencePieceTokenizer

OPTIONS = TrainingOptions(vocab_size=1000, sentinels=20)


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    """A third of a megabyte of real Python."""
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
