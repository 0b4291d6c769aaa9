"""A wrong --text-key is detected in the first rows; a few bad rows are not taken for one."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from moetron.common.errors import UserError
from moetron.data.prepare.options import Options
from moetron.data.prepare.preprocess import preprocess
from moetron.data.readers import first_rows
from moetron.data.readers.first_rows import require_texts

ROOT = Path(__file__).resolve().parents[4]
GOOD = {"text": "a text", "id": 1}
BAD = {"content": "a text", "meta": {"id": 1}}


def write(path: Path, rows: Iterable[object]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


@pytest.fixture
def options(tmp_path: Path) -> Options:
    (tmp_path / "in").mkdir()
    return Options([str(tmp_path / "in")], "bytes", str(tmp_path / "out" / "p"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_wrong_key_is_detected_in_the_first_rows(
    options: Options, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "in" / name, [BAD] * 20_000)
    read = []
    monkeypatch.setattr(first_rows, "read_chunks", counted(first_rows.read_chunks, read))
    with pytest.raises(UserError) as caught:
        preprocess(options)
    assert "--text-key text: the first rows have no text under it" in str(caught.value)
    assert f"{name}: row 1: no key 'text'; the row has content, meta" in str(caught.value)
    assert 0 < sum(read) <= 2 * first_rows.CHUNK_BYTES
    assert not list((tmp_path / "out").glob("*"))


def counted(read_chunks, read: list[int]):
    def chunks(*arguments, **named):
        for chunk in read_chunks(*arguments, **named):
            read.append(chunk.size_bytes)
            yield chunk

    return chunks


def test_a_table_names_all_its_columns(options: Options, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="the extra `arrow` is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"body": ["x"], "n": [1]}), tmp_path / "in" / "a.parquet")
    with pytest.raises(UserError, match="row 1: no key 'text'; the row has body, n"):
        preprocess(options)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": ["a"]}, "'text' is list, not a string"),
        ([GOOD, GOOD], "not a JSON object but list"),
        ({f"k{number}": 1 for number in range(99)}, "k10, k11, ..."),
        ({}, "the row has no keys at all"),
    ],
)
def test_rows_of_another_form(tmp_path: Path, row: object, reason: str) -> None:
    with pytest.raises(UserError) as caught:
        require_texts([write(tmp_path / "a.jsonl", [row] * 3)], "text", 0.001)
    assert reason in str(caught.value)


def test_a_file_that_is_one_json_document_is_refused(options: Options, tmp_path: Path) -> None:
    (tmp_path / "in" / "a.json").write_text(json.dumps([GOOD] * 5, indent=1))
    with pytest.raises(UserError, match=r"a\.json: row 1: not JSON"):
        preprocess(options)


def test_bad_rows_before_good_ones_are_no_wrong_key(options: Options, tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.jsonl", [BAD] * 999 + [GOOD] * 10)
    (manifest,) = preprocess(replace(options, max_bad_fraction=0.995)).manifests.values()
    assert (manifest.documents, manifest.filters["rejected"]) == (10, 999)


def test_a_file_of_another_key_counts_by_its_size(
    options: Options, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "in" / "a.jsonl", [GOOD] * 3000)
    write(tmp_path / "in" / "b.jsonl", [BAD] * 30)
    with pytest.raises(UserError, match=r"b\.jsonl: row 1: no key 'text'"):
        preprocess(options)
    (manifest,) = preprocess(replace(options, max_bad_fraction=0.1)).manifests.values()
    assert manifest.documents == 3000
    assert "b.jsonl: row 1: no key 'text'; the row has content, meta" in caplog.text


def test_inputs_of_which_all_are_bad_are_refused_whatever_is_allowed(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{name}.jsonl", [BAD]) for name in range(5)]
    with pytest.raises(UserError, match="and 2 more files"):
        require_texts(files, "text", 1.0)


def test_texts_and_empty_files_pass(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("no JSON")
    (tmp_path / "b.jsonl").touch()
    assert require_texts([tmp_path / "a.txt", tmp_path / "b.jsonl"], "text", 0.0) == []


def test_too_many_bad_rows_give_an_early_warning(
    options: Options, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "in" / "a.jsonl", [GOOD, BAD] * 1000)
    with pytest.raises(UserError, match="1000 of 2000 rows are bad"):
        preprocess(options)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "rows are bad (no key 'text'; the row has content, meta)" in message


def pipe(tmp_path: Path, *flags: str) -> subprocess.Popen:
    """Start preprocess_corpus on a pipe that stays open."""
    program = [sys.executable, str(ROOT / "tools" / "preprocess_corpus.py"), "--input", "-"]
    return subprocess.Popen(
        [*program, "--output-prefix", str(tmp_path / "out" / "p"), *flags],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tokenizer", "bytes"], b"standard input: row 1: no key 'text'; the row has content"),
        (["--tokenizer", "absent.model"], b"absent.model: no such file"),
    ],
)
def test_a_pipe_is_not_read_to_its_end(tmp_path: Path, flags: list[str], message: bytes) -> None:
    with pipe(tmp_path, *flags) as process:
        assert process.stdin is not None and process.stderr is not None
        with suppress(BrokenPipeError):  # it may have ended already
            process.stdin.write(b"".join([json.dumps(BAD).encode() + b"\n"] * 60_000))
            process.stdin.flush()
        assert process.wait(timeout=60) == 2  # while the pipe is open
        assert message in process.stderr.read()
        with suppress(BrokenPipeError):
            process.stdin.close()
    assert not list((tmp_path / "out").glob("*.stdin*"))
