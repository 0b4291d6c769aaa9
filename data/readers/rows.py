"""Read files in chunks: rows of JSON or of a table, or a document a file; maybe compressed."""

import gzip
import io
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from moetron.common.errors import unreadable
from moetron.data.readers.chunks import Chunk, Cursor, FileChunk, LongChunk, RowChunk
from moetron.data.readers.tables import TABLE_SUFFIXES, table_chunks
from moetron.data.readers.zstd_frames import is_complete

CHUNK_BYTES = 1 << 20
"""Text bytes of one chunk; a longer row or file makes a longer chunk."""
LONG_BYTES = 1 << 24
"""Longer rows or files are not held in memory, but read while they are encoded."""
ROW_SUFFIXES = {".jsonl", ".json", ".ndjson"}
COMPRESSED_SUFFIXES = {".gz", ".zst"}


def read_chunks(
    files: Sequence[Path],
    start: Cursor | None = None,
    chunk_bytes: int | None = None,
    columns: Sequence[str] = (),
) -> Iterator[Chunk]:
    """Split files into chunks of about ``chunk_bytes``, in order, from ``start``.

    Each chunk records the start of the next: reading from there gives the same documents. Of
    tables only ``columns`` are read; none named: all.
    """
    start = start or Cursor()
    chunk_bytes = chunk_bytes or CHUNK_BYTES
    groups = _FileGroups(chunk_bytes)
    for number, file in list(enumerate(files))[start.file :]:
        suffix = text_suffix(file)
        if suffix not in ROW_SUFFIXES | TABLE_SUFFIXES:
            yield from groups.take(file, number)
            continue
        yield from groups.rest(number)
        here = start if number == start.file else Cursor(number)
        if suffix in TABLE_SUFFIXES:
            yield from table_chunks(file, here, columns, chunk_bytes)
        else:
            yield from _row_chunks(file, here, chunk_bytes)
    yield from groups.rest(len(files))


class _FileGroups:
    """Files that are a document each, grouped into chunks."""

    def __init__(self, chunk_bytes: int) -> None:
        self._chunk_bytes = chunk_bytes
        self._waiting: list[tuple[str, bytes]] = []
        self._read_bytes = self._held_bytes = 0

    def take(self, file: Path, number: int) -> Iterator[Chunk]:
        """Read a file; yield the chunks that are full with it."""
        size = file.stat().st_size
        with content(file) as (_, stream):
            data = stream.read(LONG_BYTES + 1)
        if len(data) > LONG_BYTES:
            yield from self.rest(number)
            yield LongChunk(str(file), None, 0, None, size, Cursor(number + 1))
            return
        self._waiting.append((str(file), data))
        self._read_bytes += size
        self._held_bytes += len(data)
        if self._held_bytes >= self._chunk_bytes:
            yield from self.rest(number + 1)

    def rest(self, number: int) -> Iterator[FileChunk]:
        """Yield a chunk of the waiting files before this number."""
        if self._waiting:
            yield FileChunk(tuple(self._waiting), self._read_bytes, Cursor(number))
            self._waiting, self._read_bytes, self._held_bytes = [], 0, 0


def _row_chunks(file: Path, start: Cursor, chunk_bytes: int) -> Iterator[RowChunk | LongChunk]:
    """Yield chunks of complete lines of one file."""
    offset, line = start.offset_bytes, start.line
    with content(file) as (raw, stream):
        skip(stream, offset)
        before = raw.tell()
        while data := stream.read(chunk_bytes):
            rest = stream.readline(LONG_BYTES + 1)
            last_line = data.rfind(b"\n") + 1
            last_bytes = len(data) - last_line + len(rest)
            is_long = last_bytes > LONG_BYTES and not rest.endswith(b"\n")
            if is_long:
                data, rest = data[:last_line], b""
            lines = _newlines(data) + rest.count(b"\n")
            end = Cursor(start.file, offset + len(data) + len(rest), line + lines)
            if data:
                position = raw.tell()
                yield RowChunk(str(file), line, data, rest, position - before, end)
                before = position
            if is_long:
                begin, length = end, last_bytes + _rest_of_line(stream)
                end = Cursor(start.file, begin.offset_bytes + length, begin.line + 1)
                position = raw.tell()
                yield LongChunk(
                    str(file), begin.line, begin.offset_bytes, length, position - before, end
                )
                before = position
            offset, line = end.offset_bytes, end.line


def _newlines(data: bytes) -> int:
    """Count newlines; numpy is twice as fast as ``bytes.count``."""
    return int(np.count_nonzero(np.frombuffer(data, np.uint8) == ord("\n")))


def _rest_of_line(stream: BinaryIO) -> int:
    """Skip the rest of a line; return its bytes."""
    size_bytes = 0
    while part := stream.readline(CHUNK_BYTES):
        size_bytes += len(part)
        if part.endswith(b"\n"):
            break
    return size_bytes


def skip(stream: BinaryIO, size_bytes: int) -> None:
    """Skip the first bytes of a stream."""
    if stream.seekable():
        stream.seek(size_bytes)
        return
    while size_bytes:
        size_bytes -= len(stream.read(min(size_bytes, CHUNK_BYTES)))


def text_suffix(file: Path) -> str:
    """Return the suffix of the format, without that of the compression, in lower case."""
    packed = file.suffix.lower() in COMPRESSED_SUFFIXES
    return (Path(file.stem).suffix if packed else file.suffix).lower()


@contextmanager
def content(file: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Yield (the raw file, its decompressed content); UserError if it cannot be read.

    A compressed file that was read to its end must end as its format requires: a truncated copy
    would pass for a shorter corpus. Python's gzip and zstandard do not detect all of these cases.
    """
    errors: list[type[Exception]] = [OSError, EOFError, zlib.error]
    suffix = file.suffix.lower()
    try:
        with file.open("rb") as raw:
            if suffix == ".gz":
                stream = cast(BinaryIO, gzip.GzipFile(fileobj=raw, mode="rb"))
            elif suffix == ".zst":
                import zstandard

                errors.append(zstandard.ZstdError)
                reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
                stream = cast(BinaryIO, io.BufferedReader(reader))
            else:
                stream = raw
            yield raw, stream
            if stream is not raw and not stream.read(1):
                complete = raw.seek(0, io.SEEK_END) > 0 and (suffix == ".gz" or is_complete(raw))
                if not complete:
                    raise EOFError("the file is truncated")
    except tuple(errors) as error:
        raise unreadable(file, error) from None
