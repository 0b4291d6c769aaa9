"""Files matched by inputs: links, globs, odd names, outputs of earlier runs."""

import json
import os
from pathlib import Path

import pytest

from moetron.common.errors import UserError
from moetron.data.prepare.options import Options
from moetron.data.prepare.preprocess import preprocess
from moetron.data.readers.input_files import find_files

ROW = '{"text": "a text"}\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for name in ("a.jsonl", "sub/b.jsonl"):
        (tmp_path / "in" / name).write_text(ROW)
    return tmp_path / "in"


def names(*patterns: str | Path) -> list[str]:
    return [file.name for file in find_files([str(pattern) for pattern in patterns])]


def test_a_file_with_several_names_is_read_once(folder: Path, monkeypatch) -> None:
    (folder / "0.jsonl").symlink_to(folder / "a.jsonl")
    assert names(folder, f"{folder}/../in/a.jsonl") == ["a.jsonl", "b.jsonl"]
    monkeypatch.chdir(folder.parent)
    assert names("in", folder) == ["a.jsonl", "b.jsonl"]


def test_linked_folders_are_searched_and_cycles_end(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "in2").mkdir()
    (tmp_path / "in2" / "c.jsonl").write_text(ROW)
    (folder / "linked").symlink_to(tmp_path / "in2")
    (folder / "sub" / "up").symlink_to(folder)
    assert names(folder) == ["a.jsonl", "c.jsonl", "b.jsonl"]


def test_a_broken_link_is_refused_by_name(folder: Path) -> None:
    (folder / "gone.jsonl").symlink_to(folder / "nowhere")
    for pattern in (folder, folder / "gone.jsonl", folder / "*.jsonl"):
        with pytest.raises(UserError, match=r"gone\.jsonl: a dangling link$"):
            names(pattern)


def test_a_glob_finds_files_below_matched_folders(folder: Path) -> None:
    assert names(folder / "*") == ["a.jsonl", "b.jsonl"]
    assert names(folder / "**" / "*.jsonl") == ["a.jsonl", "b.jsonl"]


def test_brackets_and_tildes_in_names(folder: Path, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    for name in ("part[1].jsonl", "~nobody.jsonl"):
        Path(name).write_text(ROW)
        assert names(name) == [name]
    with pytest.raises(UserError, match="--input ~nobody/x: no such file"):
        names("~nobody/x")


def test_a_pipe_is_refused_with_a_remedy(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p.jsonl")
    with pytest.raises(UserError, match=r"a pipe or device; give - and redirect: --input - < .*l$"):
        names(tmp_path / "p.jsonl")


def test_names_that_are_not_utf8_are_refused(folder: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.jsonl"))
    try:
        path.write_text(ROW)
    except OSError:
        pytest.skip("a file system of UTF-8 names")
    with pytest.raises(UserError, match="its name is not UTF-8; rename it"):
        names(folder)
    options = Options([str(folder / "a.jsonl")], "bytes", str(path))
    with pytest.raises(UserError, match=r"--output-prefix .*: the name is not UTF-8"):
        preprocess(options)


@pytest.mark.parametrize("name", ["a.jsonl.bz2", "A.XZ", "a.tgz", "a.feather", "a.JSONL.lz4"])
def test_formats_that_are_not_read_are_refused(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"BZh9")
    with pytest.raises(UserError, match="files are not read; convert it to JSONL"):
        names(folder)


def test_suffixes_ignore_case(folder: Path, tmp_path: Path) -> None:
    (folder / "a.jsonl").rename(folder / "A.JSONL")
    outcome = preprocess(Options([str(folder)], "bytes", str(tmp_path / "p")))
    assert [m.text_bytes for m in outcome.manifests.values()] == [2 * len("a text")]


def test_caches_beside_a_saved_dataset_are_skipped(tmp_path: Path) -> None:
    for name in ("data-00000-of-00001.arrow", "cache-1f.arrow"):
        (tmp_path / name).write_bytes(b"")
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
    (tmp_path / "state.json").write_text(json.dumps(state))
    pytest.importorskip("pyarrow", reason="the extra `arrow` is not installed")
    assert names(tmp_path) == ["data-00000-of-00001.arrow"]


@pytest.mark.parametrize("size", [None, 4])
def test_outputs_may_be_among_the_inputs(folder: Path, size: int | None) -> None:
    (folder / "bad.jsonl").write_text("no JSON\n")
    for pattern in (str(folder), str(folder / "*")):
        for current in (False, True):
            prefix = str(folder / f"out{len(pattern)}")
            options = Options([pattern], "bytes", prefix, max_bad_fraction=0.5)
            outcome = preprocess(Options(**{**vars(options), "shard_size_tokens": size}))
            assert outcome.current == current
            assert sum(m.documents for m in outcome.manifests.values()) == 2
        for file in folder.glob("out*"):
            file.unlink()


def test_an_input_is_not_overwritten(folder: Path) -> None:
    (folder / "q.json").write_text(ROW)
    for pattern in (folder, folder / "q.json"):
        options = Options([str(pattern)], "bytes", str(folder / "q"))
        with pytest.raises(UserError, match=r"q\.json: the run would overwrite it; choose"):
            preprocess(options)
    assert (folder / "q.json").read_text() == ROW
    assert sorted(file.name for file in folder.iterdir()) == ["a.jsonl", "q.json", "sub"]


@pytest.mark.parametrize("prefix", ["", ".", "/", "x/", ".."])
def test_a_prefix_without_a_name_is_refused(folder: Path, prefix: str) -> None:
    with pytest.raises(
        UserError, match=r"--output-prefix .*: names a folder; add a file name prefix"
    ):
        preprocess(Options([str(folder)], "bytes", prefix))
