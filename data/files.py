"""Files that are either whole or not there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def beside(prefix: str | Path, suffix: str) -> Path:
    """The file ``prefix`` + ``suffix``; the prefix may hold dots."""
    path = Path(prefix)
    return path.with_name(path.name + suffix)


def replace(temporary: Path, final: Path) -> None:
    """Give a finished, synced file its name, and make the name durable."""
    temporary.replace(final)
    folder = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears at ``path``, synced, when the block ends without an exception."""
    temporary = beside(path, ".tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
