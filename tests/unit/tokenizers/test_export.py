"""Exported tokenizers in HuggingFace's AutoTokenizer, called with its defaults."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moetron.data.chat.encode_chat import encode_question, encode_rendered
from moetron.data.chat.templates import JinjaTemplate, OlmoeTemplate
from moetron.tokenizers.export import different_texts, export, export_files, exported, why_not
from moetron.tokenizers.interface import Tokenizer
from moetron.tokenizers.load import load_tokenizer
from moetron.tokenizers.umt5 import SentencePieceTokenizer
from tests.unit.data.chat.test_templates import CHATML
from tests.unit.tokenizers import kinds

transformers = pytest.importorskip("transformers")
READER = Path(__file__).with_name("read_tokenizers.py")
ALL = ["bytes", "sentencepiece", "t5_like", *kinds.KINDS]
MODEL_TYPES = ("olmoe", "mixtral", "llama", "qwen3_moe", "deepseek_v3", "openmoe")
"""Configurations of models beside a tokenizer, which can change transformers' class."""


@pytest.fixture(scope="module")
def all_kinds(
    corpus: list[str], model_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Tokenizer]:
    found = {"bytes": load_tokenizer("bytes"), "sentencepiece": load_tokenizer(model_path)}
    other = tmp_path_factory.mktemp("t5_like") / "spiece.model"
    other.write_bytes(kinds.t5_like(model_path.read_bytes()))
    found["t5_like"] = load_tokenizer(other)
    for kind in kinds.KINDS:
        found[kind] = load_tokenizer(kinds.write(kind, tmp_path_factory.mktemp(kind), corpus))
    return found


@pytest.mark.parametrize("kind", ALL)
def test_texts_get_their_ids_in_shards(
    kind: str, all_kinds: dict[str, Tokenizer], corpus: list[str], tmp_path: Path
) -> None:
    tokenizer = all_kinds[kind]
    export(tokenizer, tmp_path)
    assert different_texts(tokenizer, tmp_path, [*kinds.TEXTS, *corpus[:2]]) == []
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert theirs.bos_token_id == theirs.eos_token_id == tokenizer.eod
    assert theirs.pad_token_id == tokenizer.pad
    assert len(theirs) <= tokenizer.vocab_size, "no id is new"


@pytest.mark.parametrize("kind", ALL)
def test_an_export_read_back_is_the_same_tokenizer(
    kind: str, all_kinds: dict[str, Tokenizer], tmp_path: Path
) -> None:
    """A model imported from the export can continue with the same shards."""
    export(all_kinds[kind], tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.fingerprint == all_kinds[kind].fingerprint
    assert (again.eod, again.pad) == (all_kinds[kind].eod, all_kinds[kind].pad)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "template"])
def test_the_model_beside_it_changes_nothing(
    kind: str, model_type: str, all_kinds: dict[str, Tokenizer], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    export(all_kinds[kind], tmp_path)
    assert different_texts(all_kinds[kind], tmp_path, kinds.TEXTS) == []
    assert why_not(all_kinds[kind], tmp_path) is None


@pytest.mark.parametrize("kind", ALL)
def test_chats_get_their_ids_in_shards(
    kind: str, all_kinds: dict[str, Tokenizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the class that transformers uses alone, and in the one that it uses with our code."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "m"))
    tokenizer = all_kinds[kind]
    roles, contents = ("system", "user", "assistant", "user"), (*kinds.TEXTS[2:5], " e\u0301 \n?")
    chat = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
    for template in (
        OlmoeTemplate(tokenizer.end_text),
        JinjaTemplate(CHATML, tokenizer.end_text, "<|im_end|>"),
    ):
        folder = tmp_path / template.name
        folder.mkdir()
        for name, content in export_files(tokenizer, template.source()).items():
            (folder / name).write_bytes(content)
        assert why_not(tokenizer, folder) is None
        for trust in (False, True):
            theirs = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
            whole = theirs.apply_chat_template(chat[:3])["input_ids"]
            assert whole == encode_rendered(template.render(chat[:3]), tokenizer)[0].tolist()
            asked = theirs.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
            assert asked == encode_question(chat, template, tokenizer)
        assert load_tokenizer(folder).fingerprint == tokenizer.fingerprint


def test_a_class_forced_by_transformers_is_detected(
    all_kinds: dict[str, Tokenizer], tmp_path: Path
) -> None:
    """Beside a Qwen2 model, transformers reads every tokenizer.json as Qwen2's."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    export(all_kinds["template"], tmp_path)
    reason = why_not(all_kinds["template"], tmp_path)
    assert reason is not None and "tools/export_tokenizer.py" in reason


def test_tokens_added_by_templates_are_detected(
    all_kinds: dict[str, Tokenizer], tmp_path: Path
) -> None:
    tokenizer = all_kinds["template"]
    export(tokenizer, tmp_path)
    original = tokenizer.files["tokenizer.json"].read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(original)
    assert different_texts(tokenizer, tmp_path, ["one"]) == ["one"]


def test_a_sentencepiece_export_decodes_exactly_where_its_code_is_trusted(
    tokenizer: SentencePieceTokenizer,
    corpus: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "m"))
    export(tokenizer, tmp_path / "out")
    texts = ["  a\u2581b \u2581\n", *kinds.TEXTS, corpus[0]]
    assert different_texts(tokenizer, tmp_path / "out", texts, trust=True) == []
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    for text in texts:
        assert theirs.decode(tokenizer.encode(text)) == text


def test_files_and_special_ids_go_with_a_model(all_kinds: dict[str, Tokenizer]) -> None:
    ids, files = exported(all_kinds["bytes"])
    assert ids == {"bos_token_id": None, "eos_token_id": 256, "pad_token_id": 257}
    assert set(files) == {"tokenizer.json", "tokenizer_config.json"}
    assert exported(None) == (dict.fromkeys(ids), {})


@pytest.mark.slow
def test_the_oldest_transformers_gives_the_same_ids(
    all_kinds: dict[str, Tokenizer], tmp_path: Path, transformers4: Path
) -> None:
    folders = {}
    for kind, tokenizer in all_kinds.items():
        for model_type in (None, *MODEL_TYPES, "qwen2"):
            folder = tmp_path / kind / str(model_type)
            export(tokenizer, folder)
            if model_type is not None:
                (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
            folders[str(folder)] = tokenizer.encode_batch(kinds.TEXTS)
    texts, out = tmp_path / "texts.json", tmp_path / "out.json"
    texts.write_text(json.dumps(kinds.TEXTS))
    environment = {**os.environ, "PYTHONPATH": str(transformers4)}
    command = [sys.executable, str(READER), str(texts), str(out), *folders]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert found["version"].startswith("4.57.")
    assert found["ids"] == folders
