"""Files that are complete or absent: atomic writes, durable names, checksums."""

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from moetron.common.errors import UserError

_BLOCK_BYTES = 1 << 22


def is_utf8(name: str) -> bool:
    """Return whether a file name is valid UTF-8; other names contain surrogates (PEP 383)."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def beside(prefix: str | Path, suffix: str) -> Path:
    """Return the path ``prefix`` + ``suffix``; the prefix may contain dots.

    Raises:
        UserError: the prefix has no file name.
    """
    path = Path(prefix)
    if path.name in ("", ".."):
        raise UserError(f"{str(prefix)!r} is a folder; give the beginning of names in it")
    return path.with_name(path.name + suffix)


def read_regular(path: Path) -> bytes:
    """Return the content of a regular file; never wait for a writer, as reading of a FIFO does.

    Raises:
        OSError: it is a FIFO, a device or a folder, or cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return file.read()


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    digest, buffer = hashlib.sha256(), bytearray(_BLOCK_BYTES)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def sync(file: BinaryIO) -> None:
    """Flush a file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, where its file system can: SMB cannot."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def begin_sync(file: BinaryIO, start: int) -> int:
    """Start to write back the bytes from ``start`` to the end, without waiting; return the end.

    A later ``sync`` then waits less. Linux writes back dirty pages that are marked as not needed,
    and drops only clean ones; elsewhere this does nothing.
    """
    file.flush()
    end = file.tell()
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), start, end - start, os.POSIX_FADV_DONTNEED)
    return end


def open_at(path: Path, size_bytes: int) -> BinaryIO:
    """Open a binary file to append after its first ``size_bytes``; truncate what follows them.

    0 creates the file. Otherwise it must exist and be at least that long.
    """
    file = path.open("r+b" if size_bytes else "w+b")
    file.truncate(size_bytes)
    file.seek(size_bytes)
    return file


def require_writable(prefix: str | Path) -> None:
    """Create the folder of ``prefix``; raise OSError if no file can be written there."""
    trial = beside(prefix, ".trial")
    trial.parent.mkdir(parents=True, exist_ok=True)
    trial.touch()
    trial.unlink()


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary file that appears at ``path``, synced, if the block ends without an exception.

    Readers, and the disk after a crash, see the old content or the new one.
    """
    temporary = beside(path, ".tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            sync(file)
        rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically."""
    with atomic_file(path) as file:
        file.write(text.encode())


def rename(source: Path, target: Path) -> None:
    """Rename a synced file, replacing ``target``, or a folder; make the new name durable."""
    source.replace(target)
    sync_folder(target.parent)
