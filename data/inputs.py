"""Raw text from files: rows of JSON, or a document a file; plain or compressed."""

import glob
import gzip
import importlib.util
import io
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import orjson

from moetron.data.errors import DataError

CHUNK_BYTES = 1 << 20
"""Text that one task holds; a longer row or file makes a longer task."""
ROW_SUFFIXES = {".jsonl", ".json", ".ndjson"}
COMPRESSED_SUFFIXES = {".gz", ".zst"}
FOREIGN_SUFFIXES = {".parquet", ".arrow", ".bin", ".idx", ".npy", ".npz", ".zip", ".tar", ".xz"}


@dataclass(frozen=True)
class Reject:
    """A row or file that holds no usable text."""

    file: str
    line: int | None
    """From 1; None where a file is a document."""
    reason: str


@dataclass(frozen=True)
class Cursor:
    """A place in the inputs from which reading can go on."""

    file: int = 0
    """Number of the file."""
    offset_bytes: int = 0
    """Of its content, decompressed, that was read."""
    line: int = 1
    """Number of the line that comes next."""


@dataclass(frozen=True)
class RowChunk:
    """Whole lines of one file, each a JSON object."""

    file: str
    first_line: int
    """Number of the first line, from 1."""
    data: bytes
    read_bytes: int
    """Bytes of the input file that went into this chunk (fewer than ``data`` if compressed)."""
    end: Cursor
    """Where the next chunk begins."""

    @property
    def size_bytes(self) -> int:
        """Memory that the chunk takes."""
        return len(self.data)

    def texts(self, text_key: str) -> Iterator[str | Reject]:
        """The text of each row; blank lines are passed over."""
        for number, line in enumerate(self.data.split(b"\n"), self.first_line):
            if line and not line.isspace():
                try:
                    yield _row_text(line, text_key)
                except _BadRow as error:
                    yield Reject(self.file, number, str(error))


@dataclass(frozen=True)
class FileChunk:
    """Whole files, each a document."""

    files: tuple[tuple[str, bytes], ...]
    """(name, content)."""
    read_bytes: int
    end: Cursor

    @property
    def size_bytes(self) -> int:
        """Memory that the chunk takes."""
        return sum(len(data) for _, data in self.files)

    def texts(self, text_key: str) -> Iterator[str | Reject]:
        """The text of each file."""
        for name, data in self.files:
            try:
                yield data.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                yield Reject(name, None, f"not UTF-8 (byte {error.start})")


Chunk = RowChunk | FileChunk


def find_files(patterns: Sequence[str]) -> list[Path]:
    """The files that paths, folders (with what is below them) and globs name, sorted, each once.

    Raises DataError, all problems at once: nothing matches, or a file is of a kind not read here.
    """
    problems, found = [], set()
    for pattern in patterns:
        files = _match(pattern)
        if not files:
            problems.append(f"--input {pattern}: no such file, nor a folder or glob with files")
        found.update(files)
    problems += [f"{file}: {problem}" for file in sorted(found) if (problem := _unreadable(file))]
    if problems:
        raise DataError("\n".join(problems))
    return sorted(found)


def read_chunks(files: Sequence[Path], start: Cursor | None = None) -> Iterator[Chunk]:
    """Cut files into tasks of about ``CHUNK_BYTES``, in order, from ``start`` on.

    Each task says where the next begins: reading on from there gives the same tasks.
    """
    start = start or Cursor()
    waiting: list[tuple[str, bytes]] = []
    waiting_bytes = read_bytes = 0
    for number, file in list(enumerate(files))[start.file :]:
        if _text_suffix(file) in ROW_SUFFIXES:
            if waiting:
                yield FileChunk(tuple(waiting), read_bytes, Cursor(number))
                waiting, waiting_bytes, read_bytes = [], 0, 0
            yield from _row_chunks(file, start if number == start.file else Cursor(number))
            continue
        with _content(file) as (_, stream):
            waiting.append((str(file), stream.read()))
        waiting_bytes += len(waiting[-1][1])
        read_bytes += file.stat().st_size
        if waiting_bytes >= CHUNK_BYTES:
            yield FileChunk(tuple(waiting), read_bytes, Cursor(number + 1))
            waiting, waiting_bytes, read_bytes = [], 0, 0
    if waiting:
        yield FileChunk(tuple(waiting), read_bytes, Cursor(len(files)))


def _row_chunks(file: Path, start: Cursor) -> Iterator[RowChunk]:
    """Whole lines of one file."""
    offset, line = start.offset_bytes, start.line
    with _content(file) as (raw, stream):
        _skip(stream, offset)
        before = raw.tell()
        while data := stream.read(CHUNK_BYTES):
            data += stream.readline()
            offset += len(data)
            position, lines = raw.tell(), data.count(b"\n")
            end = Cursor(start.file, offset, line + lines)
            yield RowChunk(str(file), line, data, position - before, end)
            line, before = end.line, position


def _skip(stream: BinaryIO, size_bytes: int) -> None:
    """Leave out the beginning of a stream that was read before."""
    if stream.seekable():
        stream.seek(size_bytes)
        return
    while size_bytes:
        size_bytes -= len(stream.read(min(size_bytes, CHUNK_BYTES)))


class _BadRow(ValueError):
    """A row without usable text."""


def _row_text(line: bytes, text_key: str) -> str:
    """The text of a row."""
    try:
        row: Any = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise _BadRow(f"not JSON ({error.msg})") from None
    if not isinstance(row, dict):
        raise _BadRow(f"not a JSON object but {type(row).__name__}")
    if text_key not in row:
        raise _BadRow(f"no key {text_key!r}")
    text = row[text_key]
    if not isinstance(text, str):
        raise _BadRow(f"{text_key!r} is {type(text).__name__}, not a string")
    return text


def _match(pattern: str) -> list[Path]:
    """Files that one pattern names; hidden files below a folder are passed over."""
    path = Path(pattern).expanduser()
    if path.is_dir():
        below = (file for file in path.rglob("*") if file.is_file())
        return [f for f in below if not any(p.startswith(".") for p in f.relative_to(path).parts)]
    names = glob.glob(str(path), recursive=True)  # noqa: PTH207 - Path.glob refuses absolute ones
    return [Path(name) for name in names if Path(name).is_file()]


def _unreadable(file: Path) -> str | None:
    """Why a file cannot be an input, if so."""
    suffix = _text_suffix(file)
    if suffix in FOREIGN_SUFFIXES:
        return f"{suffix} files are not read; convert it to JSONL, one document a line"
    if file.suffix == ".zst" and importlib.util.find_spec("zstandard") is None:
        return "needs the package zstandard (pip install zstandard)"
    return None


def _text_suffix(file: Path) -> str:
    """The suffix that tells the format, without that of the compression."""
    return Path(file.stem).suffix if file.suffix in COMPRESSED_SUFFIXES else file.suffix


@contextmanager
def _content(file: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """(the file as it is, its decompressed content); DataError if it cannot be read."""
    errors: list[type[Exception]] = [OSError, EOFError, zlib.error]
    try:
        with file.open("rb") as raw:
            if file.suffix == ".gz":
                yield raw, cast(BinaryIO, gzip.GzipFile(fileobj=raw, mode="rb"))
            elif file.suffix == ".zst":
                import zstandard

                errors.append(zstandard.ZstdError)
                reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
                yield raw, io.BufferedReader(reader)
            else:
                yield raw, raw
    except tuple(errors) as error:
        raise DataError(f"{file}: cannot be read ({error})") from None
