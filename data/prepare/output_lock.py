"""Lock of an output, so that no two runs write the same files."""

import errno
import fcntl
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from moetron.common.errors import UserError
from moetron.common.files import beside

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
"""Errors of file systems without locks."""

logger = logging.getLogger(__name__)


@contextmanager
def lock_outputs(prefixes: Sequence[str]) -> Iterator[None]:
    """Lock these outputs; UserError if another run holds one of them.

    ``PREFIX.lock`` is locked with flock, which the system releases when the process ends.
    """
    with ExitStack() as locks:
        for prefix in prefixes:
            locks.enter_context(_lock_output(prefix))
        yield


@contextmanager
def _lock_output(prefix: str) -> Iterator[None]:
    """Lock one output."""
    path = beside(prefix, ".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _lock(path, prefix)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before others may lock it
        os.close(file)


def _lock(path: Path, prefix: str) -> int:
    """Return a descriptor of the locked file; create it again if its last owner removed it."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise UserError(
                f"--output-prefix {prefix}: another run is writing it; "
                "wait until it ends or choose another prefix"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(file)
                raise
            logger.warning("%s: no file locks here; do not start another run", path.parent)
            return file
        if _is_same(file, path):
            return file
        os.close(file)


def _is_same(file: int, path: Path) -> bool:
    """Return whether a descriptor still refers to the file at ``path``."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False
