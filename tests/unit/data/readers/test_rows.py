"""Tables, saved datasets, Dolma's folders, standard input."""

import gzip
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetron.common.errors import UserError
from moetron.data.encoding.filters import Filters
from moetron.data.prepare.options import Options
from moetron.data.prepare.preprocess import preprocess
from moetron.data.readers import rows as inputs_module
from moetron.data.readers import tables
from moetron.data.readers.chunks import Cursor, LongChunk, Reject
from moetron.data.readers.input_files import find_files
from moetron.data.readers.rows import read_chunks
from moetron.data.shards.shard import Shard
from moetron.tokenizers.byte_level import ByteTokenizer

TOOL = Path(__file__).parents[4] / "tools" / "preprocess_corpus.py"
TEXTS = [f"document {i}: {'äöü 漢字 ' * (i % 7)}" for i in range(100)]


def decoded(prefix: str) -> list[str]:
    shard = Shard(prefix)
    return [ByteTokenizer().decode(shard.document(i)) for i in range(len(shard))]


@pytest.fixture
def options(tmp_path: Path, monkeypatch) -> Options:
    """Options from ``in`` to ``out/p``, in many chunks."""
    monkeypatch.setattr(inputs_module, "CHUNK_BYTES", 700)
    monkeypatch.setattr(tables, "BATCH_ROWS", 13)
    (tmp_path / "in").mkdir()
    return Options([str(tmp_path / "in")], "bytes", str(tmp_path / "out" / "p"))


def write_tables(folder: Path, texts: list) -> None:
    """Write the same rows as Parquet, as an Arrow file and as an Arrow stream file."""
    pyarrow = pytest.importorskip("pyarrow", reason="the extra `arrow` is not installed")
    from pyarrow import ipc, parquet

    table = pyarrow.table({"id": range(len(texts)), "text": texts, "big": [[1.0] * 9] * len(texts)})
    parquet.write_table(table, folder / "a.parquet", row_group_size=30)
    for name, new in (("b.arrow", ipc.new_file), ("c.arrow", ipc.new_stream)):
        with new(str(folder / name), table.schema) as writer:
            writer.write_table(table, max_chunksize=17)


ROW = st.sampled_from(['{"text": "%s"}' % ("word " * n) for n in (0, 1, 9)] + ["", "not JSON"])


@given(
    lines=st.lists(ROW, max_size=12),
    ended=st.booleans(),
    chunk_bytes=st.integers(1, 90),
    long_bytes=st.integers(20, 60),
)
def test_rows_do_not_depend_on_the_chunks(
    tmp_path_factory, lines: list[str], ended: bool, chunk_bytes: int, long_bytes: int
) -> None:
    file = tmp_path_factory.getbasetemp() / "rows.jsonl"
    text = "\n".join(lines) + "\n" * ended
    expected = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line]

    def rows(start: Cursor) -> Iterator[tuple[Cursor, list[tuple[int, str]]]]:
        """Yield each chunk's end, and its (number, row) as in the file."""
        for chunk in read_chunks([file], start, chunk_bytes):
            numbers = range(start.line, chunk.end.line + 1)
            inside = text.encode()[start.offset_bytes : chunk.end.offset_bytes].decode()
            found = [pair for pair in zip(numbers, inside.split("\n"), strict=False) if pair[1]]
            if isinstance(chunk, LongChunk):
                assert [(chunk.line, chunk.length_bytes)] == [(found[0][0], len(inside))]
            else:
                documents = list(chunk.documents("text"))
                bad = [row.line for row in documents if isinstance(row, Reject)]
                assert bad == [number for number, row in found if row == "not JSON"]
                good = [row[0] for row in documents if not isinstance(row, Reject)]
                assert good == [json.loads(row)["text"] for _, row in found if row != "not JSON"]
            start = chunk.end
            yield start, found

    file.write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs_module, "LONG_BYTES", long_bytes)
        tasks = list(rows(Cursor()))
        assert [pair for _, found in tasks for pair in found] == expected
        for number, (end, _) in enumerate(tasks, 1):
            rest = [pair for _, found in tasks[number:] for pair in found]
            assert [pair for _, found in rows(end) for pair in found] == rest


def test_reads_tables(options: Options) -> None:
    folder = Path(options.inputs[0])
    write_tables(folder, TEXTS)
    for name in ("dataset_info.json", "state.json"):  # of HuggingFace's save_to_disk
        (folder / name).write_text('{"not": "a document"}')
    outcome = preprocess(options)
    assert decoded(options.output_prefix) == TEXTS * 3
    size = sum(path.stat().st_size for path in find_files(options.inputs))
    assert f"100% of {size / 1e6:.1f} MB" in outcome.summary


def test_a_table_is_continued_at_any_row(options: Options) -> None:
    folder = Path(options.inputs[0])
    write_tables(folder, TEXTS)
    for number, file in enumerate(find_files(options.inputs)):
        for row in (1, 2, 14, 50, 100):
            chunks = read_chunks([file], Cursor(0, line=row), columns=["text"])
            pairs = [(chunk.first_row, list(chunk.documents("text"))) for chunk in chunks]
            assert [text for _, found in pairs for text, _ in found] == TEXTS[row - 1 :], number
            assert pairs[0][0] == row and pairs[0][1][0][1] == {"text": TEXTS[row - 1]}


def test_bad_rows_of_a_table_are_numbered(options: Options) -> None:
    write_tables(Path(options.inputs[0]), ["one", None, "three"])
    chunks = list(read_chunks(find_files(options.inputs), columns=["text"]))
    rejects = [d for c in chunks for d in c.documents("text") if isinstance(d, Reject)]
    assert [(Path(r.file).name, r.line) for r in rejects] == [
        (name, 2) for name in ("a.parquet", "b.arrow", "c.arrow")
    ]
    assert rejects[0].reason == "'text' is NoneType, not a string"
    with pytest.raises(UserError, match="no key 'body'"):
        preprocess(replace(options, text_key="body"))


def test_a_broken_table_is_named(options: Options) -> None:
    pytest.importorskip("pyarrow", reason="the extra `arrow` is not installed")
    for name in ("a.parquet", "b.arrow"):
        file = Path(options.inputs[0]) / name
        file.write_bytes(b"ARROW1 but not really")
        with pytest.raises(UserError, match=f"{name}: cannot be read"):
            preprocess(options)
        file.unlink()


def test_reads_dolmas_folders(options: Options) -> None:
    rows = [
        {"id": str(i), "text": text, "source": "web", "metadata": {"max_stars_count": i}}
        for i, text in enumerate(TEXTS)
    ]
    packed = gzip.compress("\n".join(map(json.dumps, rows)).encode())
    for kind in ("documents", "attributes/toxic"):
        folder = Path(options.inputs[0]) / "v1" / kind
        folder.mkdir(parents=True)
        (folder / "0000.json.gz").write_bytes(packed)
    preprocess(options)
    assert decoded(options.output_prefix) == TEXTS
    few = replace(options, filters=Filters(min_stars=90))
    manifest = preprocess(few).manifests[options.output_prefix]
    assert decoded(options.output_prefix) == TEXTS[90:]
    assert manifest.filters["few stars"] == 90


def test_reads_standard_input(options: Options) -> None:
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    command = [sys.executable, str(TOOL), "--input", "-", "--tokenizer", "bytes"]
    command += ["--output-prefix", options.output_prefix, "--workers", "1"]
    for rows_given, state in ((rows, "done"), (rows, "current"), (rows + rows, "done")):
        done = subprocess.run(
            command, input=rows_given, capture_output=True, text=True, timeout=60, check=True
        )
        assert done.stdout.startswith(state)
    assert decoded(options.output_prefix) == TEXTS * 2
    names = sorted(path.name for path in Path(options.output_prefix).parent.iterdir())
    assert names == ["p.bin", "p.idx", "p.json"]
