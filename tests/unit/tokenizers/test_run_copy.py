"""Copy of the tokenizer in a run's folder."""

from pathlib import Path

import pytest

from moetron.common.errors import UserError
from moetron.tokenizers import run_copy
from moetron.tokenizers.interface import Tokenizer
from moetron.tokenizers.load import load_tokenizer
from moetron.tokenizers.run_copy import find_copy, keep, load_run_tokenizer, name_of, open_named
from tests.unit.tokenizers import kinds


@pytest.fixture(params=["sentencepiece", "template"])
def original(
    request: pytest.FixtureRequest, model: bytes, corpus: list[str], tmp_path: Path
) -> Tokenizer:
    """Load a file beside other files, which are not copied."""
    folder = tmp_path / "original"
    folder.mkdir()
    (folder / "notes.txt").write_text("not the tokenizer's")
    if request.param == "template":
        return load_tokenizer(kinds.write("template", folder, corpus))
    (folder / "own name.model").write_bytes(model)
    return load_tokenizer(folder / "own name.model")


def run_folder(tmp_path: Path, original: Tokenizer) -> Path:
    run = tmp_path / "run"
    run.mkdir()
    keep(original, run, replace=True)
    return run


def test_a_copy_works_without_the_original(original: Tokenizer, tmp_path: Path) -> None:
    run = run_folder(tmp_path, original)
    names = {path.name for path in (run / "tokenizer").iterdir()}
    assert names == {*original.files, "fingerprint"}
    for path in original.files.values():
        path.unlink()
    (run / "step_0000001").mkdir()
    for path in (run, run / "step_0000001"):
        found = load_run_tokenizer(path, None, "gone.model", [original.fingerprint])
        assert found.fingerprint == original.fingerprint and found.eod == original.eod
        assert open_named("gone.model", str(path)).fingerprint == original.fingerprint
    assert load_tokenizer(name_of(original, run)).fingerprint == original.fingerprint
    assert Path(name_of(original, run)).is_absolute()


def test_a_copy_is_found_from_within_its_step_folder(
    original: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_folder(tmp_path, original)
    (run / "step_0000001").mkdir()
    monkeypatch.chdir(run / "step_0000001")
    assert find_copy(Path()) == run / "tokenizer"
    monkeypatch.chdir(tmp_path)
    assert find_copy(Path()) is None


def test_a_changed_copy_is_refused(original: Tokenizer, tmp_path: Path, corpus: list[str]) -> None:
    run = run_folder(tmp_path, original)
    copy = run / "tokenizer"
    for name in original.files:
        (copy / name).unlink()
    (tmp_path / "other").mkdir()
    other = load_tokenizer(kinds.write("roberta", tmp_path / "other", corpus))
    (copy / "tokenizer.json").write_bytes(other.files["tokenizer.json"].read_bytes())
    for use in (
        lambda: load_run_tokenizer(run, None, None, []),
        lambda: open_named("gone.model", str(run)),
        lambda: keep(original, run, replace=False),
    ):
        with pytest.raises(UserError, match="was changed"):
            use()
    assert load_run_tokenizer(run, str(next(iter(original.files.values()))), None, [])


def test_another_tokenizer_replaces_a_copy_that_no_checkpoint_needs(
    original: Tokenizer, tmp_path: Path, corpus: list[str]
) -> None:
    run = run_folder(tmp_path, original)
    (tmp_path / "other").mkdir()
    other = load_tokenizer(kinds.write("roberta", tmp_path / "other", corpus))
    with pytest.raises(UserError, match="another folder to --save"):
        keep(other, run, replace=False)
    keep(other, run, replace=True)
    assert load_run_tokenizer(run, None, None, []).fingerprint == other.fingerprint
    assert {path.name for path in run.iterdir()} == {"tokenizer"}


def test_a_crash_while_copying_leaves_no_copy(
    original: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    run.mkdir()

    def fail(path: Path, content: str) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(run_copy, "write_text", fail)
        with pytest.raises(OSError, match="no space"):
            keep(original, run, replace=True)
    assert find_copy(run) is None
    keep(original, run, replace=True)
    assert find_copy(run) is not None and not (run / "tokenizer.tmp").exists()


def test_bytes_need_no_copy(tmp_path: Path) -> None:
    keep(load_tokenizer("bytes"), tmp_path, replace=True)
    assert not list(tmp_path.iterdir())
    assert name_of(load_tokenizer("bytes"), tmp_path) == "bytes"
    assert load_run_tokenizer(tmp_path, None, "bytes", []).kind == "bytes"
