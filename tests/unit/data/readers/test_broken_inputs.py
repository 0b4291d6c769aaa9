"""Inputs that are damaged, truncated, or change while they are read."""

import gzip
import time
from dataclasses import replace
from pathlib import Path

import pytest

from moetron.common.errors import UserError
from moetron.data.prepare import output
from moetron.data.prepare.options import Options
from moetron.data.prepare.preprocess import preprocess
from moetron.data.readers import standard_input
from moetron.data.readers.chunks import Reject
from moetron.data.readers.rows import content, read_chunks

TEXT = b"".join(b'{"text": "row %d of some hundred"}\n' % (i * 7919) for i in range(9000))


@pytest.fixture
def options(tmp_path: Path) -> Options:
    (tmp_path / "in").mkdir()
    return Options([str(tmp_path / "in")], "bytes", str(tmp_path / "out" / "p"))


def zstd(*, checksum: bool, sized: bool) -> bytes:
    """Return frames of several blocks, one a repeated byte, around a skippable frame."""
    zstandard = pytest.importorskip("zstandard", reason="the extra `zstd` is not installed")
    packer = zstandard.ZstdCompressor(write_checksum=checksum, write_content_size=sized)
    skippable = (0x184D2A53).to_bytes(4, "little") + (5).to_bytes(4, "little") + b"12345"
    return packer.compress(TEXT) + skippable + packer.compress(b" " * 300_000 + b"\n")


@pytest.mark.parametrize("checksum", [False, True])
@pytest.mark.parametrize("sized", [False, True])
def test_a_zstandard_file_truncated_anywhere_is_refused(
    options: Options, tmp_path: Path, checksum: bool, sized: bool
) -> None:
    file, data = tmp_path / "in" / "a.jsonl.zst", zstd(checksum=checksum, sized=sized)
    file.write_bytes(data)
    assert [m.documents for m in preprocess(options).manifests.values()] == [9000]
    last = data.index(b"12345") + 5
    for size in {*range(0, len(data), 997), len(data) - 1, len(data) - 4, last - 1, last + 3}:
        file.write_bytes(data[:size])
        refused = pytest.raises(UserError, match=r"a\.jsonl\.zst: cannot be read \(")
        with refused, content(file) as (_, stream):
            stream.read()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="the file is truncated"):
        preprocess(replace(options, max_bad_fraction=1.0))
    assert not [path for path in (tmp_path / "out").iterdir() if ".tmp" in path.name]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".txt.zst"])
def test_an_empty_compressed_file_is_refused(options: Options, tmp_path: Path, suffix: str) -> None:
    (tmp_path / "in" / "a.jsonl").write_bytes(TEXT)
    (tmp_path / "in" / f"b{suffix}").touch()
    with pytest.raises(UserError, match=r"b.*: cannot be read"):
        preprocess(options)
    (tmp_path / "in" / f"b{suffix}").write_bytes(gzip.compress(b""))
    if suffix.endswith(".gz"):
        preprocess(options)


@pytest.mark.parametrize("long_bytes", [20, 1 << 24])
def test_a_byte_order_mark_is_no_part_of_the_first_row(
    options: Options, tmp_path: Path, monkeypatch, long_bytes: int
) -> None:
    monkeypatch.setattr("moetron.data.readers.rows.LONG_BYTES", long_bytes)
    monkeypatch.setattr("moetron.data.readers.rows.CHUNK_BYTES", 8)
    (tmp_path / "in" / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + TEXT[:1000].rpartition(b"\n")[0])
    (manifest,) = preprocess(options).manifests.values()
    assert manifest.filters["rejected"] == 0
    (tmp_path / "in" / "a.jsonl").write_bytes(TEXT[:40] + b"\xef\xbb\xbf" + TEXT[40:80])
    with pytest.raises(UserError, match="not JSON"):
        preprocess(options)


def test_rows_of_a_table_that_are_not_utf8_are_rejected_alone(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="the extra `arrow` is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    values = pyarrow.array([b"one", b"tw\xff", b"three"], pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 3, values.buffers())
    parquet.write_table(pyarrow.table({"text": text}), tmp_path / "a.parquet")
    (chunk,) = read_chunks([tmp_path / "a.parquet"], columns=["text"])
    first, bad, last = chunk.documents("text")
    assert (first[0], last[0]) == ("one", "three")
    assert bad == Reject(str(tmp_path / "a.parquet"), 2, "not UTF-8 (byte 2)")


def test_tables_without_rows_and_with_a_column_twice(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="the extra `arrow` is not installed")
    from pyarrow import ipc, parquet

    empty = pyarrow.record_batch({"text": pyarrow.array([], pyarrow.string())})
    with ipc.new_stream(str(tmp_path / "a.arrow"), empty.schema) as writer:
        writer.write_batch(empty)
    assert list(read_chunks([tmp_path / "a.arrow"], columns=["text"])) == []
    twice = pyarrow.table([pyarrow.array(["a"])] * 2, names=["text", "text"])
    with ipc.new_file(str(tmp_path / "b.arrow"), twice.schema) as writer:
        writer.write_table(twice)
    parquet.write_table(twice, tmp_path / "c.parquet")
    for name in ("b.arrow", "c.parquet"):
        with pytest.raises(UserError, match="has the column 'text' twice; rename one"):
            list(read_chunks([tmp_path / name], columns=["text"]))


def test_an_input_that_grows_meanwhile_is_refused(
    options: Options, tmp_path: Path, monkeypatch
) -> None:
    file = tmp_path / "in" / "a.jsonl"
    file.write_bytes(TEXT)
    take = output.Output.take

    def grow(self: output.Output, *arguments) -> None:
        take(self, *arguments)
        file.write_bytes(TEXT * 2)

    monkeypatch.setattr(output.Output, "take", grow)
    with pytest.raises(UserError, match=r"a\.jsonl: changed while it was read; run again"):
        preprocess(options)
    assert list((tmp_path / "out").iterdir()) == []


def test_many_empty_files_take_linear_time(tmp_path: Path) -> None:
    """With a sum over all waiting files, these took half a minute."""
    for number in range(200):
        (tmp_path / f"{number}").touch()
    files = [tmp_path / f"{number % 200}" for number in range(40_000)]
    started = time.process_time()
    (chunk,) = read_chunks(files)
    assert len(chunk.files) == 40_000
    assert time.process_time() - started < 15


def test_a_closed_standard_input_is_a_users_mistake(options: Options, monkeypatch) -> None:
    monkeypatch.setattr(standard_input.sys, "stdin", None)
    with pytest.raises(UserError, match="--input -: standard input is closed"):
        preprocess(replace(options, inputs=["-"]))
