"""A look at the first rows of the inputs before the work: is there text under the key?"""

from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

from moetron.common.errors import UserError
from moetron.data.readers.chunks import (
    Chunk,
    Cursor,
    FileChunk,
    LongChunk,
    Reject,
    RowChunk,
    TableChunk,
    key_list,
)
from moetron.data.readers.rows import ROW_SUFFIXES, read_chunks, text_suffix
from moetron.data.readers.tables import TABLE_SUFFIXES

ROWS = 1000
"""Rows of a file without a text, after which the key is taken for wrong."""
FILES = 256
"""Files that are looked at, spread over all; their first rows are read."""
FILES_SHOWN = 3
CHUNK_BYTES = 1 << 16


def require_texts(files: Sequence[Path], text_key: str, max_bad_fraction: float) -> list[str]:
    """Refuse inputs whose first rows have no text under the key; else, what is wrong with some.

    A file counts as bad where none of its first 1,000 rows has a text, whatever comes later, and
    bad files are refused where they hold more than ``max_bad_fraction`` of the bytes, or all.

    Raises UserError, naming files and the keys that their rows have.
    """
    bad: list[str] = []
    bad_bytes = good_bytes = 0
    for file in files[:: -(-len(files) // FILES)]:
        problem = _problem(file, text_key)
        if problem is None:
            good_bytes += file.stat().st_size
        else:
            bad.append(f"{file}: {problem}")
            bad_bytes += file.stat().st_size
    if bad and (good_bytes == 0 or bad_bytes > max_bad_fraction * (bad_bytes + good_bytes)):
        raise UserError(_refusal(text_key, bad))
    return bad


def require_text(name: str, head: bytes, text_key: str) -> None:
    """Raise UserError where whole JSON rows begin an input, and none of them has a text."""
    whole = head[: head.rfind(b"\n") + 1]
    chunk = RowChunk(name, 1, whole, b"", len(whole), Cursor())
    if whole and (problem := _problem_of_rows(iter([chunk]), text_key)):
        raise UserError(_refusal(text_key, [f"{name}: {problem}"]))


def _refusal(text_key: str, bad: list[str]) -> str:
    """The message for files without text."""
    more = [f"and {len(bad) - FILES_SHOWN} more files"] if len(bad) > FILES_SHOWN else []
    lines = "".join(f"\n  {line}" for line in bad[:FILES_SHOWN] + more)
    return (
        f"--text-key {text_key}: the first rows hold no text under it; name the key that does, or "
        f"leave these inputs out:{lines}"
    )


def _problem(file: Path, text_key: str) -> str | None:
    """Why a file holds no texts, as far as its first rows say; what cannot be read is not judged.

    A file that is a document, an empty one, and one that begins with a row too long to hold, pass.
    """
    if text_suffix(file) not in ROW_SUFFIXES | TABLE_SUFFIXES:
        return None
    try:
        return _problem_of_rows(read_chunks([file], chunk_bytes=CHUNK_BYTES), text_key)
    except UserError:
        return None


def _problem_of_rows(chunks: Iterator[Chunk], text_key: str) -> str | None:
    """Why the first of some rows hold no text; None where one does, or there are none."""
    rejects: list[Reject] = []
    first = next(chunks, None)
    for chunk in chain([first] if first else [], chunks):
        if isinstance(chunk, LongChunk | FileChunk):
            return None
        for document in islice(chunk.documents(text_key), ROWS - len(rejects)):
            if not isinstance(document, Reject):
                return None
            rejects.append(document)
        if len(rejects) >= ROWS:
            break
    if first is None or not rejects:
        return None
    keys = ""
    if isinstance(first, TableChunk):
        keys = f"; the row has {key_list(first.batch.schema.names)}"
    return f"row {rejects[0].line}: {rejects[0].reason}{keys}"
