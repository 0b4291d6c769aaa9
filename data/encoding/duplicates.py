"""Which documents were there before: digests of token ids on the disk, not in memory."""

import hashlib
import sqlite3
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from moetron.common.files import beside

DIGEST_BYTES = 16
CACHE_KIB = 1 << 18
"""Memory that the digests may take, whatever their number."""


class Seen:
    """The documents of one shard so far: a table of digests in an SQLite file.

    Who asks decides the order, so the first of equal documents stays, whichever worker encoded it.
    Each digest bears the number of its document among all that were asked about: after a kill, what
    came after the last mark is forgotten.
    """

    def __init__(self, prefix: str | Path, asked: int = 0) -> None:
        """Go on after the first ``asked`` documents; 0: begin."""
        self.path = seen_path(prefix)
        if asked == 0:
            self.path.unlink(missing_ok=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.asked = asked
        self._table = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        for setting in (f"cache_size = -{CACHE_KIB}", "synchronous = FULL"):
            self._table.execute(f"PRAGMA {setting}")
        self._table.execute(
            "CREATE TABLE IF NOT EXISTS seen (digest BLOB PRIMARY KEY, number INT) WITHOUT ROWID"
        )
        self._table.execute("BEGIN")
        self._table.execute("DELETE FROM seen WHERE number >= ?", (asked,))

    def are_new(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Which documents equal none before them: ``tokens`` [sum(lengths)] -> bool [documents]."""
        return np.fromiter(map(self.is_new, _digests(tokens, lengths)), bool, lengths.size)

    def mark(self) -> int:
        """Bring everything to the disk; the documents that a successor need not ask about."""
        self._table.execute("COMMIT")
        self._table.execute("BEGIN")
        return self.asked

    def close(self) -> None:
        """Forget what came after the last mark."""
        self._table.close()

    def is_new(self, digest: bytes) -> bool:
        """Whether a document's digest was not there yet; it is now."""
        statement = "INSERT OR IGNORE INTO seen VALUES (?, ?)"
        added = self._table.execute(statement, (digest, self.asked)).rowcount
        self.asked += 1
        return added == 1


def seen_path(prefix: str | Path) -> Path:
    """``PREFIX.seen.tmp``."""
    return beside(prefix, ".seen.tmp")


def begin_digest() -> "hashlib.blake2b":
    """What a document's ids, in the bytes of the shard's dtype, are to be fed to."""
    return hashlib.blake2b(digest_size=DIGEST_BYTES)


def _digests(tokens: np.ndarray, lengths: np.ndarray) -> Iterable[bytes]:
    """A digest of each document's ids."""
    payload, end = np.ascontiguousarray(tokens).view(np.uint8).data, 0
    for size in (lengths * tokens.itemsize).tolist():
        end += size
        digest = begin_digest()
        digest.update(payload[end - size : end])
        yield digest.digest()
