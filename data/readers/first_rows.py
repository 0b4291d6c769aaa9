"""Check the first rows of the inputs for text under the key, before the work starts."""

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
"""Rows of a file without text after which the key counts as wrong."""
FILES = 256
"""Files checked, spread over all."""
FILES_SHOWN = 3
CHUNK_BYTES = 1 << 16


def require_texts(files: Sequence[Path], text_key: str, max_bad_fraction: float) -> list[str]:
    """Raise UserError if the first rows of the inputs lack text; return problems of single files.

    A file is bad if none of its first 1,000 rows has text, whatever comes later. The inputs are
    rejected if bad files hold more than ``max_bad_fraction`` of the bytes, or all.

    The error names files and the keys of their rows.
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
    """Raise UserError if an input starts with JSON rows, none of which has text."""
    lines = head[: head.rfind(b"\n") + 1]
    chunk = RowChunk(name, 1, lines, b"", len(lines), Cursor())
    if lines and (problem := _problem_of_rows(iter([chunk]), text_key)):
        raise UserError(_refusal(text_key, [f"{name}: {problem}"]))


def _refusal(text_key: str, bad: list[str]) -> str:
    """Return the message for files without text."""
    more = [f"and {len(bad) - FILES_SHOWN} more files"] if len(bad) > FILES_SHOWN else []
    lines = "".join(f"\n  {line}" for line in bad[:FILES_SHOWN] + more)
    return (
        f"--text-key {text_key}: the first rows have no text under it; name the right key, or "
        f"leave these inputs out:{lines}"
    )


def _problem(file: Path, text_key: str) -> str | None:
    """Return why a file's first rows have no text, or None; unreadable files are not judged.

    Files that are documents, empty ones, and ones that start with a too long row pass.
    """
    if text_suffix(file) not in ROW_SUFFIXES | TABLE_SUFFIXES:
        return None
    try:
        return _problem_of_rows(read_chunks([file], chunk_bytes=CHUNK_BYTES), text_key)
    except UserError:
        return None


def _problem_of_rows(chunks: Iterator[Chunk], text_key: str) -> str | None:
    """Return why the first rows have no text; None if one has, or there are none."""
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
