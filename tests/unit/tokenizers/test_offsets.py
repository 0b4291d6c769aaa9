"""Places of tokens in a text."""

from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from moetron.tokenizers.byte_level import ByteTokenizer
from moetron.tokenizers.huggingface import HuggingFaceTokenizer
from moetron.tokenizers.interface import Tokenizer
from moetron.tokenizers.load import load_tokenizer
from moetron.tokenizers.train import TrainingOptions, train

TEXT = "Ein Wort, zwei Wörter\n<|user|>\n中 x"


@pytest.fixture(scope="module", params=["bytes", "sentencepiece", "huggingface"])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("kind")
    if request.param == "bytes":
        return ByteTokenizer()
    if request.param == "huggingface":
        vocab = {c: n for n, c in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "</s>"])}
        model = tokenizers.Tokenizer(models.BPE(vocab, []))
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.add_special_tokens(["</s>"])
        model.save(str(folder / "tokenizer.json"))
        return HuggingFaceTokenizer(folder / "tokenizer.json")
    files = sorted(Path(__file__).parent.glob("*.py"))
    corpus = [file.read_text(encoding="utf-8") for file in files]
    content = train(corpus, TrainingOptions(600, sentinels=0, padding_multiple=1))
    (folder / "sp.model").write_bytes(content)
    return load_tokenizer(folder / "sp.model")


def test_places(tokenizer: Tokenizer) -> None:
    ids, starts, ends = tokenizer.encode_with_offsets(TEXT)
    assert ids == tokenizer.encode(TEXT)
    assert starts == sorted(starts) and ends == sorted(ends)
    covered = {
        place for start, end in zip(starts, ends, strict=True) for place in range(start, end)
    }
    assert covered >= {place for place, char in enumerate(TEXT) if not char.isspace()}
    assert min(starts) == 0 and max(ends) == len(TEXT)
    assert tokenizer.encode_with_offsets("") == ([], [], [])


def test_spelling_of_the_end(tokenizer: Tokenizer) -> None:
    named = tokenizer.id_of(tokenizer.end_text)
    assert named in (tokenizer.eod, None)  # bytes have no such piece
