"""Chunks of unencoded text: rows of JSON, rows of a table, or complete files."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import orjson

BOM = b"\xef\xbb\xbf"
"""Byte order mark that some editors write before UTF-8; not part of the text."""
KEYS_SHOWN = 12
Document = tuple[str, dict[str, Any]]
"""Text of a row, and the row (empty if a file is a document)."""


@dataclass(frozen=True)
class Reject:
    """Row or file without usable text."""

    file: str
    line: int | None
    """Line from 1; None if a file is a document."""
    reason: str


@dataclass(frozen=True)
class Cursor:
    """Position in the inputs from which reading can continue."""

    file: int = 0
    """Index of the file."""
    offset_bytes: int = 0
    """Decompressed bytes already read; 0 in a table."""
    line: int = 1
    """Number of the next line or row."""


@dataclass(frozen=True)
class RowChunk:
    """Whole lines of one file, each a JSON object."""

    file: str
    first_line: int
    """Number of the first line, from 1."""
    data: bytes
    rest: bytes
    """Rest of the last line of ``data``."""
    read_bytes: int
    """Bytes of the input file in this chunk (fewer than ``data`` if compressed)."""
    end: Cursor
    """Start of the next chunk."""

    @property
    def size_bytes(self) -> int:
        """Return the memory of the chunk."""
        return len(self.data) + len(self.rest)

    def documents(self, text_key: str) -> Iterator[Document | Reject]:
        """Yield the text of each row; skip blank lines."""
        view = memoryview(self.data)
        marked = self.first_line == 1 and self.data.startswith(BOM)
        start = len(BOM) if marked else 0
        for number in count(self.first_line):
            end = self.data.find(b"\n", start)
            line = view[start:end] if end >= 0 else self.data[start:] + self.rest
            try:
                row = row_of(line)
            except orjson.JSONDecodeError as error:
                if bytes(line).strip():
                    yield Reject(self.file, number, f"not JSON ({error.msg})")
            else:
                yield document_of(row, text_key, self.file, number)
            if end < 0:
                return
            start = end + 1


def row_of(line: memoryview | bytes) -> Any:
    """Return a row of JSON; NaN and infinities, which Python and pandas write, become null.

    Raises orjson.JSONDecodeError for anything else that is not JSON.
    """
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        text = bytes(line)
        if b"NaN" not in text and b"Infinity" not in text:
            raise
        try:
            return orjson.loads(
                orjson.dumps(json.loads(text.decode()))
            )  # dumps refuses broken text
        except (ValueError, TypeError, RecursionError):
            pass
        raise


@dataclass(frozen=True)
class FileChunk:
    """Whole files, each a document."""

    files: tuple[tuple[str, bytes], ...]
    """(name, content)."""
    read_bytes: int
    end: Cursor

    @property
    def size_bytes(self) -> int:
        """Return the memory of the chunk."""
        return sum(len(data) for _, data in self.files)

    def documents(self, text_key: str) -> Iterator[Document | Reject]:
        """Yield the text of each file."""
        for name, data in self.files:
            try:
                yield data.decode("utf-8-sig"), {}
            except UnicodeDecodeError as error:
                yield Reject(name, None, f"not UTF-8 (byte {error.start})")


@dataclass(frozen=True)
class TableChunk:
    """Rows of a Parquet or Arrow file."""

    file: str
    first_row: int
    """Number of the first row, from 1."""
    batch: Any
    """pyarrow.RecordBatch."""
    read_bytes: int
    end: Cursor

    @property
    def size_bytes(self) -> int:
        """Return the memory of the chunk."""
        return self.batch.nbytes

    def documents(self, text_key: str) -> Iterator[Document | Reject]:
        """Yield the text of each row."""
        absent = text_key not in self.batch.schema.names
        for number, row in enumerate(self._rows(), self.first_row):
            if isinstance(row, str):
                yield Reject(self.file, number, row)
            elif absent:  # possibly not all columns were read
                yield Reject(self.file, number, f"no key {text_key!r}")
            else:
                yield document_of(row, text_key, self.file, number)

    def _rows(self) -> Iterator[dict[str, Any] | str]:
        """Yield the rows, or for an invalid one the reason: pyarrow does not check text."""
        try:
            yield from self.batch.to_pylist()
        except (ValueError, OverflowError):
            for number in range(self.batch.num_rows):
                try:
                    yield self.batch.slice(number, 1).to_pylist()[0]
                except UnicodeDecodeError as error:
                    yield f"not UTF-8 (byte {error.start})"
                except (ValueError, OverflowError) as error:
                    yield f"cannot be read ({error})"


@dataclass(frozen=True)
class LongChunk:
    """Location of a row or file that is too long to hold in memory."""

    file: str
    line: int | None
    """Number of the row, from 1; None if the file is the document."""
    offset_bytes: int
    """Start of the row in the file's decompressed content."""
    length_bytes: int | None
    """Length of the row; None: to the end of the file."""
    read_bytes: int
    end: Cursor

    @property
    def size_bytes(self) -> int:
        """Return the memory of the chunk."""
        return 0


Chunk = RowChunk | FileChunk | TableChunk | LongChunk


def document_of(row: Any, text_key: str, file: str, line: int) -> Document | Reject:
    """Return the document of a row."""
    if not isinstance(row, dict):
        return Reject(file, line, f"not a JSON object but {type(row).__name__}")
    if text_key not in row:
        return Reject(file, line, f"no key {text_key!r}; the row has {key_list(row)}")
    text = row[text_key]
    if not isinstance(text, str):
        return Reject(file, line, f"{text_key!r} is {type(text).__name__}, not a string")
    return text, row


def key_list(keys: Iterable[str]) -> str:
    """Return the first keys of a row, for a message."""
    names = list(keys)
    shown = ", ".join(name[:40] for name in names[:KEYS_SHOWN])
    return (shown + (", ..." if len(names) > KEYS_SHOWN else "")) or "no keys at all"
