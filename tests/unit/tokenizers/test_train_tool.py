"""tools/train_tokenizer.py: from JSONL to a tokenizer with a record of its origin."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from moetron.common.errors import UserError
from moetron.tokenizers.load import load_tokenizer

TOOL = Path(__file__).resolve().parents[3] / "tools" / "train_tokenizer.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return importlib.import_module("moetron.commands.train_tokenizer")


def write_corpus(folder: Path, corpus: list[str]) -> str:
    folder.mkdir()
    rows = [json.dumps({"text": text}) for text in corpus]
    (folder / "code.jsonl").write_text("\n".join([*rows, '{"no": "text"}']))
    return str(folder)


def test_it_trains_once_and_records_its_inputs(
    tool: ModuleType, corpus: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, prefix = write_corpus(tmp_path / "in", corpus), tmp_path / "out" / "tok.v1"
    arguments = ["--input", folder, "--output", str(prefix), "--vocab-size", "1000"]
    assert tool.main(arguments) == 0
    assert "code" in capsys.readouterr().out
    path = tmp_path / "out" / "tok.v1.model"
    sidecar = json.loads((tmp_path / "out" / "tok.v1.json").read_text())
    tokenizer = load_tokenizer(path)
    assert sidecar["fingerprint"] == tokenizer.fingerprint
    assert sidecar["vocab_size"] == tokenizer.vocab_size == 1024
    assert sidecar["fertility_on_training_text"]["code"]["bytes_per_token"] > 1.5
    assert (tmp_path / "out" / "tok.v1.fertility.png").read_bytes().startswith(b"\x89PNG")
    written = path.stat().st_mtime_ns
    assert tool.main(arguments) == 0
    assert capsys.readouterr().out == f"{path} is current\n"
    assert tool.main([*arguments, "--sentinels", "10"]) == 0
    assert path.stat().st_mtime_ns > written


def test_a_damaged_model_is_made_again(tool: ModuleType, corpus: list[str], tmp_path: Path) -> None:
    folder, prefix = write_corpus(tmp_path / "in", corpus), tmp_path / "tok"
    arguments = ["--input", folder, "--output", str(prefix), "--vocab-size", "1000"]
    tool.main(arguments)
    path = tmp_path / "tok.model"
    content = path.read_bytes()
    path.write_bytes(content[:100])
    tool.main(arguments)
    assert path.read_bytes() == content


def test_mistakes_exit_with_2_and_one_message(tmp_path: Path) -> None:
    command = [sys.executable, str(TOOL), "--input", str(tmp_path / "*.jsonl"), "--output", "x"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "*.jsonl" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flag", "value", "rule"),
    [
        ("--sample-mb", "nan", "give a number above 0"),
        ("--unimax", "-1", "give a number above 0"),
        ("--vocab-size", "5", "leave too few pieces to learn; give at least"),
    ],
)
def test_flags_are_checked_before_the_corpus_is_read(
    tmp_path: Path, flag: str, value: str, rule: str
) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(b"cannot be read")
    command = [sys.executable, str(TOOL), "--input", str(tmp_path / "a.jsonl.gz")]
    output = ["--output", str(tmp_path / "out" / "tok"), flag, value]
    run = subprocess.run([*command, *output], capture_output=True, text=True)
    assert run.returncode == 2
    assert flag in run.stderr and value in run.stderr and rule in run.stderr
    assert not (tmp_path / "out").exists()


def test_an_input_is_not_overwritten(tool: ModuleType, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.json"
    corpus.write_text('{"text": "a text"}\n')
    with pytest.raises(ValueError, match=r"--output .*: would overwrite the input .*corpus\.json"):
        tool.main(["--input", str(corpus), "--output", str(tmp_path / "corpus")])
    assert corpus.read_text() == '{"text": "a text"}\n'


def test_an_output_that_cannot_be_written_is_detected_before_training(
    tool: ModuleType, corpus: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_corpus(tmp_path / "in", corpus)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file"):
        tool.main(["--input", folder, "--output", str(tmp_path / "file" / "tok")])
    assert "training" not in capsys.readouterr().out


def test_a_corpus_without_text_is_a_users_mistake(
    tool: ModuleType, corpus: list[str], tmp_path: Path
) -> None:
    folder = write_corpus(tmp_path / "in", corpus)
    with pytest.raises(ValueError, match=r"--text-key body: .*\n.*code.jsonl: row 1: .* has text"):
        tool.main(["--input", folder, "--output", str(tmp_path / "t"), "--text-key", "body"])


def test_a_damaged_sidecar_is_made_again(
    tool: ModuleType, corpus: list[str], tmp_path: Path
) -> None:
    folder = write_corpus(tmp_path / "in", corpus)
    arguments = ["--input", folder, "--output", str(tmp_path / "t"), "--vocab-size", "1000"]
    tool.main(arguments)
    (tmp_path / "t.json").write_text('{"kind": ')
    assert tool.main(arguments) == 0
    assert json.loads((tmp_path / "t.json").read_text())["vocab_size"] == 1024
