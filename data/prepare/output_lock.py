"""One run at a time for each output: two would write into each other's files."""

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
"""What file systems without locks answer."""

logger = logging.getLogger(__name__)


@contextmanager
def held(prefixes: Sequence[str]) -> Iterator[None]:
    """Keep other runs away from these outputs; UserError if one is at work on them.

    ``PREFIX.lock`` is locked, not just there: the system lets go of it when a process ends, however
    it ends.
    """
    with ExitStack() as locks:
        for prefix in prefixes:
            locks.enter_context(_locked(prefix))
        yield


@contextmanager
def _locked(prefix: str) -> Iterator[None]:
    """Hold one output."""
    path = beside(prefix, ".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _lock(path, prefix)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before others may lock it
        os.close(file)


def _lock(path: Path, prefix: str) -> int:
    """A descriptor of the locked file, made anew if its last owner has just removed it."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise UserError(
                f"--output-prefix {prefix}: another run is writing it; "
                "wait for its end or choose another prefix"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(file)
                raise
            logger.warning("%s: no locks here; let no other run write there", path.parent)
            return file
        if _is_same(file, path):
            return file
        os.close(file)


def _is_same(file: int, path: Path) -> bool:
    """Whether a descriptor's file still bears its name."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False
