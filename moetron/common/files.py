"""Files that are either whole or not there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from moetron.common.errors import UserError


def is_utf8(name: str) -> bool:
    """Whether the name of a file is text; others come with stand-ins for bytes (PEP 383)."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def beside(prefix: str | Path, suffix: str) -> Path:
    """The file ``prefix`` + ``suffix``; the prefix may hold dots. UserError if it has no name."""
    path = Path(prefix)
    if path.name in ("", ".."):
        raise UserError(f"{str(prefix)!r} is a folder; give the beginning of names in it")
    return path.with_name(path.name + suffix)


def bare_prefix(word: str) -> str:
    """A prefix without the ending of one of its two files, with which it may be given."""
    return word.removesuffix(".idx") if word.endswith(".idx") else word.removesuffix(".bin")


def replace(temporary: Path, final: Path) -> None:
    """Give a finished, synced file its name, and make the name durable."""
    temporary.replace(final)
    folder = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def sync(file: BinaryIO) -> None:
    """Bring a file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def begin_sync(file: BinaryIO, start: int) -> int:
    """Let the disk take what was written from byte ``start`` on, without waiting; where that ends.

    A later ``sync`` then has less to wait for. Linux starts to write dirty pages that it is told
    nobody needs, and only drops clean ones; elsewhere nothing happens.
    """
    file.flush()
    end = file.tell()
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), start, end - start, os.POSIX_FADV_DONTNEED)
    return end


def open_at(path: Path, size_bytes: int) -> BinaryIO:
    """A binary file to write on after its first ``size_bytes``; what lies behind them is dropped.

    0 begins a new file. Otherwise the file must be there and hold as much.
    """
    file = path.open("r+b" if size_bytes else "w+b")
    file.truncate(size_bytes)
    file.seek(size_bytes)
    return file


def require_writable(prefix: str | Path) -> None:
    """Make the folder of ``prefix``, and raise OSError if no file can be written there."""
    trial = beside(prefix, ".trial")
    trial.parent.mkdir(parents=True, exist_ok=True)
    trial.touch()
    trial.unlink()


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears at ``path``, synced, when the block ends without an exception."""
    temporary = beside(path, ".tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            sync(file)
        replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file so that readers, and the disk after a crash, see the old text or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    rename(temporary, path)


def rename(source: Path, target: Path) -> None:
    """Rename within a folder, and make the new name last."""
    source.rename(target)
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
