"""Rows on standard input, copied to a file, because a run may have to read them twice."""

import hashlib
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moetron.common.errors import UserError
from moetron.common.files import beside
from moetron.data.readers.first_rows import require_text

NAME = "-"
HEAD_BYTES = 1 << 20


class _Hashing:
    """File that hashes the bytes written to it."""

    def __init__(self, file: Any) -> None:
        self._file, self.digest = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self._file.write(data)


@contextmanager
def with_copy(inputs: Sequence[str], prefix: str, text_key: str) -> Iterator[list[str]]:
    """Yield ``inputs`` with ``-`` replaced by ``PREFIX.stdin.jsonl``, a copy of standard input.

    Its modification time follows from its content: inputs are identified by name, size and time, so
    the same rows are the same input again. The copy is removed at the end.

    Raises UserError if standard input is the only input and its first rows have no text.
    """
    if NAME not in inputs:
        yield list(inputs)
        return
    copy = copy_path(prefix)
    copy.parent.mkdir(parents=True, exist_ok=True)
    try:
        _copy(copy, text_key if set(inputs) == {NAME} else None)
        yield [str(copy) if name == NAME else name for name in inputs]
    finally:
        copy.unlink(missing_ok=True)


def copy_path(prefix: str) -> Path:
    """Return ``PREFIX.stdin.jsonl``."""
    return beside(prefix, ".stdin.jsonl")


def _copy(path: Path, text_key: str | None) -> None:
    """Write standard input to a file; with a key, check its first rows before the rest."""
    if sys.stdin is None:
        raise UserError("--input -: standard input is closed; redirect or pipe rows to it")
    with path.open("wb") as file:
        hashing = _Hashing(file)
        head = sys.stdin.buffer.read(HEAD_BYTES)
        if text_key is not None and len(head) == HEAD_BYTES:
            require_text("standard input", head, text_key)
        hashing.write(head)
        shutil.copyfileobj(sys.stdin.buffer, hashing, 1 << 20)
    time_ns = int.from_bytes(hashing.digest.digest()[:7], "little")
    os.utime(path, ns=(time_ns, time_ns))
