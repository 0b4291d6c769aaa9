"""Text of one row or file too long to hold in memory: read in blocks, repeatedly.

For a JSON row, an outline with all strings but the long ones is parsed; the long ones are only
located, and the one that is the text is read and unescaped block by block.
"""

import codecs
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import orjson

from moetron.common.errors import UserError
from moetron.data.readers.chunks import BOM, LongChunk, Reject, document_of, row_of
from moetron.data.readers.rows import LONG_BYTES, content, skip

BLOCK_BYTES = 1 << 20
HELD_BYTES = 1 << 16
"""Longer strings are replaced in a row's outline."""
LONG_STRING = "\0long string "
"""Stand-in for a long string in the outline, followed by its number."""
LONGEST_ESCAPE = 12
"""Bytes of a surrogate pair, the longest JSON escape."""


class Unreadable(Exception):
    """Exception: a row or file has no usable text; the argument is the reason."""


class LongText:
    """Document of a ``LongChunk``."""

    row: dict[str, Any]
    """The row with its long strings replaced; empty if a file is the document."""

    def __init__(self, chunk: LongChunk, text_key: str) -> None:
        """Read the outline; raises Unreadable."""
        self._chunk = chunk
        self.row = {}
        if chunk.line is not None:
            self.row, text = self._outline(text_key)
            number = text.removeprefix(LONG_STRING)
            self._short = text if number == text else None
            self._span = (0, 0) if number == text else self._spans[int(number)]

    @property
    def empty(self) -> bool:
        """Return whether there is no text."""
        return self._chunk.line is not None and self._short == ""

    def blocks(self) -> Iterator[str]:
        """Yield the text in parts; raises Unreadable if it is invalid."""
        if self._chunk.line is None:
            return _decoded(self._raw(0, None))
        if self._short is not None:
            return iter([self._short])
        return _unescaped(self._raw(*self._span))

    def _outline(self, text_key: str) -> tuple[dict[str, Any], str]:
        """Return (row, text) with stand-ins for long strings."""
        chunk = self._chunk
        outline, self._spans = _outline(self._raw(0, chunk.length_bytes))
        try:
            row = row_of(outline.removeprefix(BOM) if chunk.line == 1 else outline)
        except orjson.JSONDecodeError as error:
            raise Unreadable(f"not JSON ({error.msg})") from None
        document = document_of(row, text_key, chunk.file, chunk.line or 0)
        if isinstance(document, Reject):
            raise Unreadable(document.reason)
        return document[1], document[0]

    def _raw(self, start: int, end: int | None) -> Iterator[bytes]:
        """Yield the bytes of the row or file."""
        with content(Path(self._chunk.file)) as (_, stream):
            skip(stream, self._chunk.offset_bytes + start)
            left = None if end is None else end - start
            while left != 0 and (block := stream.read(min(BLOCK_BYTES, left or BLOCK_BYTES))):
                left = None if left is None else left - len(block)
                yield block
            if left:
                raise UserError(f"{self._chunk.file}: became shorter during the run")


def _outline(blocks: Iterable[bytes]) -> tuple[bytes, list[tuple[int, int]]]:
    """Return a JSON text with stand-ins for its long strings, and their spans.

    A quotation mark opens a string, or closes it unless an odd number of backslashes precedes it.
    """
    outline, string = bytearray(), bytearray()
    spans: list[tuple[int, int]] = []
    start: int | None = None  # of the current string
    position = slashes_before = 0
    for block in blocks:
        at = 0
        while True:
            quote = block.find(b'"', at)
            end = quote if quote >= 0 else len(block)
            (outline if start is None else string).extend(block[at:end])
            if len(string) > HELD_BYTES:
                del string[HELD_BYTES + 1 :]
            slashes = _slashes(block, end)
            slashes += slashes_before if slashes == end else 0
            if quote < 0:
                break
            at, place = end + 1, position + end
            if start is None:
                start = place + 1
            elif slashes % 2:
                string += b'"'
                continue
            else:
                if len(string) > HELD_BYTES:
                    string[:] = orjson.dumps(f"{LONG_STRING}{len(spans)}")[1:-1]
                    spans.append((start, place))
                outline += b'"%b"' % bytes(string)
                start = None
                string.clear()
        position, slashes_before = position + len(block), slashes
        if len(outline) > LONG_BYTES:
            raise Unreadable(f"more than {LONG_BYTES} bytes without its long strings")
    return bytes(outline if start is None else outline + b'"'), spans


def _slashes(block: bytes, end: int) -> int:
    """Return the number of backslashes just before ``end``."""
    first = end
    while first and block[first - 1] == ord("\\"):
        first -= 1
    return end - first


def _unescaped(blocks: Iterable[bytes]) -> Iterator[str]:
    """Yield a JSON string's characters from the bytes between its quotation marks.

    A block that ends within a character or an escape is not valid JSON: its end is moved to the
    next block.
    """
    left = b""
    for block in blocks:
        data = left + block
        for back in range(min(LONGEST_ESCAPE - 1, len(data)) + 1):
            try:
                text = orjson.loads(b'"%b"' % data[: len(data) - back])
            except orjson.JSONDecodeError as error:
                problem = error.msg
            else:
                left = data[len(data) - back :]
                yield text
                break
        else:
            raise Unreadable(f"not JSON ({problem})")
    if left:
        raise Unreadable("not JSON (a string ends within a character)")


def _decoded(blocks: Iterable[bytes]) -> Iterator[str]:
    """Decode UTF-8, without a byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    position = 0
    try:
        for block in blocks:
            pending = len(decoder.getstate()[0])
            yield decoder.decode(block)
            position += len(block)
        pending = len(decoder.getstate()[0])
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise Unreadable(f"not UTF-8 (byte {position - pending + error.start})") from None
    if decoder.getstate()[0]:  # Python never emits a partial byte order mark
        raise Unreadable(f"not UTF-8 (byte {position - pending})")
