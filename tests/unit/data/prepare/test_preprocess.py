import gzip
import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from moetron.common.errors import UserError
from moetron.data.encoding.encode import is_held_out
from moetron.data.prepare.options import Options
from moetron.data.prepare.preprocess import preprocess
from moetron.data.readers import rows as inputs_module
from moetron.data.shards.shard import Shard
from moetron.tokenizers.byte_level import ByteTokenizer

TOOL = Path(__file__).parents[4] / "tools" / "preprocess_corpus.py"
TEXTS = [f"document {i}: {'äöü 漢字 ' * (i % 7)}" for i in range(200)]
EOD = ByteTokenizer.eod


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch) -> None:
    """Make several chunks even of small files."""
    monkeypatch.setattr(inputs_module, "CHUNK_BYTES", 1000)


def rows(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(texts)).encode()


def decoded(prefix: str) -> list[str]:
    """Return a shard's texts, read by megatron-core; every document must end with one EOD."""
    documents = [document.tolist() for document in IndexedDataset(prefix)]
    assert all(document.count(EOD) == 1 and document[-1] == EOD for document in documents)
    return [ByteTokenizer().decode(document) for document in documents]


@pytest.fixture
def options(tmp_path: Path) -> Options:
    (tmp_path / "in.jsonl").write_bytes(rows(TEXTS))
    return Options(
        [str(tmp_path / "in.jsonl")], "bytes", str(tmp_path / "out" / "p"), append_eod=True
    )


def test_documents_come_back_in_order(options: Options) -> None:
    outcome = preprocess(options)
    assert decoded(options.output_prefix) == TEXTS
    manifest = outcome.manifests[options.output_prefix]
    assert Shard(options.output_prefix).verify() == []
    assert manifest == Shard(options.output_prefix).manifest
    assert manifest.documents == 200
    assert manifest.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert manifest.tokens == manifest.text_bytes + 200
    assert manifest.tokenizer.fingerprint == ByteTokenizer.fingerprint
    assert not list(Path(options.output_prefix).parent.glob("*.tmp"))
    assert not list(Path(options.output_prefix).parent.glob("*.rejects.jsonl"))


def test_workers_do_not_change_the_bytes(options: Options, tmp_path: Path) -> None:
    preprocess(options)
    others = replace(options, workers=3, output_prefix=str(tmp_path / "out" / "q"))
    preprocess(others)
    for suffix in (".bin", ".idx"):
        one = Path(options.output_prefix + suffix).read_bytes()
        assert Path(others.output_prefix + suffix).read_bytes() == one


def test_reads_compressed_rows_and_plain_files(options: Options, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    (folder / "sub" / ".hidden").mkdir(parents=True)
    (folder / "a.json.gz").write_bytes(gzip.compress(rows(TEXTS[:50])))
    (folder / "b.txt").write_text("\ufeffwith a mark", encoding="utf-8")
    (folder / "sub" / "c.py").write_text("print(1)\n")
    (folder / "sub" / "d.md.gz").write_bytes(gzip.compress(b"packed"))
    (folder / "sub" / ".hidden" / "e.txt").write_text("not this")
    preprocess(replace(options, inputs=[str(folder)]))
    assert sorted(decoded(options.output_prefix)) == sorted(
        [*TEXTS[:50], "with a mark", "print(1)\n", "packed"]
    )


def test_reads_zstandard(options: Options, tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    packed = tmp_path / "a.jsonl.zst"
    packed.write_bytes(b"".join(zstandard.compress(rows(part)) for part in (TEXTS[:9], TEXTS[9:])))
    preprocess(replace(options, inputs=[str(packed)]))
    assert decoded(options.output_prefix) == TEXTS


def test_holdout_is_decided_by_content(options: Options, tmp_path: Path) -> None:
    held = replace(options, holdout_fraction=0.2, holdout_prefix=str(tmp_path / "out" / "v"))
    preprocess(held)
    training, validation = decoded(held.output_prefix), decoded(str(held.holdout_prefix))
    assert training == [text for text in TEXTS if not is_held_out(text, 0.2)]
    assert validation == [text for text in TEXTS if is_held_out(text, 0.2)]
    assert 20 <= len(validation) <= 60
    assert {t for t in TEXTS if is_held_out(t, 0.05)} < set(validation)
    (tmp_path / "in.jsonl").write_bytes(rows(TEXTS[::-1] + TEXTS))  # other order, copies
    preprocess(held)
    assert set(decoded(str(held.holdout_prefix))) == set(validation)


def test_a_second_run_finds_its_output_current(options: Options, tmp_path: Path) -> None:
    first = preprocess(options)
    again = preprocess(replace(options, workers=2))
    assert not first.current and again.current and again.manifests == first.manifests
    assert not preprocess(replace(options, append_eod=False)).current
    assert not preprocess(options).current
    stat = (tmp_path / "in.jsonl").stat()
    os.utime(tmp_path / "in.jsonl", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert not preprocess(options).current
    Path(options.output_prefix + ".bin").write_bytes(b"")
    assert not preprocess(options).current
    assert decoded(options.output_prefix) == TEXTS


BAD_LINES = {
    "{not json}": "not JSON",
    '["text"]': "not a JSON object but list",
    '{"body": "x"}': "no key 'text'",
    '{"text": 3}': "'text' is int, not a string",
    '{"text": null}': "'text' is NoneType, not a string",
    '{"text": "\\ud800"}': "not JSON",
    '{"text": "\\ud800", "score": NaN}': "not JSON",
    '{"text": NaN}': "'text' is NoneType, not a string",
}


def test_numbers_that_python_and_pandas_write_do_not_cost_the_row(
    options: Options, tmp_path: Path
) -> None:
    scores = itertools.cycle([math.nan, math.inf, -math.inf, 1.0])
    made = [json.dumps({"text": text, "score": next(scores)}) for text in TEXTS]
    (tmp_path / "in.jsonl").write_text("\n".join(made))
    preprocess(options)
    assert decoded(options.output_prefix) == TEXTS


def test_bad_rows_are_listed_with_file_line_and_reason(options: Options, tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}) for text in TEXTS]
    for number, bad in enumerate(BAD_LINES):
        lines.insert(30 * number + 2, bad)
    lines[100:100] = ["", "  ", '{"text": ""}']
    (tmp_path / "in.jsonl").write_bytes("\n".join(lines).encode() + b'\n{"text": "\xff"}')
    lines.append("\xff")
    outcome = preprocess(replace(options, max_bad_fraction=0.05, workers=2))
    assert decoded(options.output_prefix) == TEXTS
    assert outcome.manifests[options.output_prefix].filters == {"rejected": 9, "empty": 1}
    rejects = Path(options.output_prefix + ".rejects.jsonl").read_text().splitlines()
    for reject in map(json.loads, rejects):
        assert reject["file"] == str(tmp_path / "in.jsonl")
        assert reject["reason"].startswith(BAD_LINES.get(lines[reject["line"] - 1], "not JSON"))
    assert len(rejects) == 9


def test_too_many_bad_rows_leave_only_their_list(options: Options, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(rows(TEXTS) + b"bad\n")
    with pytest.raises(UserError, match=r"1 of 201 rows .*0\.001(.|\n)*in\.jsonl:201: not JSON"):
        preprocess(options)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["p.rejects.jsonl"]
    preprocess(replace(options, max_bad_fraction=0.01))
    assert decoded(options.output_prefix) == TEXTS


def test_a_file_that_is_not_utf8_is_a_bad_row(options: Options, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"ok so far \xff")
    (tmp_path / "b.txt").write_text("fine")
    inputs = [str(tmp_path / "*.txt")]
    preprocess(replace(options, inputs=inputs, max_bad_fraction=0.5))
    assert decoded(options.output_prefix) == ["fine"]
    reject = json.loads(Path(options.output_prefix + ".rejects.jsonl").read_text())
    assert reject == {
        "file": str(tmp_path / "a.txt"),
        "line": None,
        "reason": "not UTF-8 (byte 10)",
    }


def test_nothing_is_left_of_a_run_that_fails(options: Options, tmp_path: Path) -> None:
    (tmp_path / "z.jsonl.gz").write_bytes(gzip.compress(rows(TEXTS))[:-20])
    with pytest.raises(UserError, match=r"z\.jsonl\.gz: cannot be read"):
        preprocess(replace(options, inputs=[str(tmp_path)]))
    assert list((tmp_path / "out").iterdir()) == []


def test_option_problems_come_all_at_once(options: Options) -> None:
    wrong = replace(options, workers=0, holdout_fraction=1.5, max_bad_fraction=-1)
    with pytest.raises(UserError) as caught:
        preprocess(wrong)
    for flag in (
        "--workers 0",
        "--holdout-fraction 1.5",
        "--max-bad-fraction -1",
        "both or neither",
    ):
        assert flag in str(caught.value)


@pytest.mark.parametrize("ending", [".bin", ".idx"])
def test_a_prefix_has_no_ending_of_a_shard(options: Options, tmp_path: Path, ending: str) -> None:
    """``--data-path P.bin`` means P: a shard with such a name could not be given."""
    with pytest.raises(UserError, match=r"give the name without \.bin or \.idx"):
        preprocess(replace(options, output_prefix=str(tmp_path / f"p{ending}")))


def test_input_problems_come_all_at_once(options: Options, tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"PK")
    (tmp_path / "empty").mkdir()
    wrong = [str(tmp_path / name) for name in ("none-*.txt", "empty", "a.zip")]
    with pytest.raises(UserError) as caught:
        preprocess(replace(options, inputs=wrong))
    for name in wrong:
        assert name in str(caught.value)


@pytest.mark.parametrize(("content", "message"), [(b"", "no document"), (b"\n\n", "no document")])
def test_refuses_an_empty_corpus(options: Options, tmp_path: Path, content, message) -> None:
    (tmp_path / "in.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        preprocess(options)


def run_tool(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(TOOL), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_command_writes_a_shard_and_reports_it(options: Options) -> None:
    arguments = ("--input", *options.inputs, "--tokenizer", "bytes", "--append-eod")
    done = run_tool(*arguments, "--output-prefix", options.output_prefix, "--workers", "2")
    assert (done.returncode, done.stderr) == (0, "")
    assert "200 documents" in done.stdout
    assert decoded(options.output_prefix) == TEXTS


def test_the_command_names_a_users_mistake_in_one_message(options: Options, tmp_path: Path) -> None:
    file = str(tmp_path / "in.jsonl")
    mistakes = {
        "no such file": ("--input", "nowhere.jsonl", "--tokenizer", "bytes"),
        "nowhere.model": ("--input", file, "--tokenizer", "nowhere.model"),
        "/proc/p": ("--input", file, "--tokenizer", "bytes", "--output-prefix", "/proc/p"),
    }
    for message, arguments in mistakes.items():
        done = run_tool("--output-prefix", options.output_prefix, *arguments)
        assert done.returncode == 2, done
        assert message in done.stderr and "Traceback" not in done.stderr
