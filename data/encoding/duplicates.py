"""Find duplicate documents by digests of their token ids, on disk instead of in memory."""

import hashlib
import sqlite3
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from moetron.common.files import beside

DIGEST_BYTES = 16
CACHE_KIB = 1 << 18
"""Memory limit of the digests."""


class Seen:
    """Documents of one output so far: a table of digests in an SQLite file.

    The caller's order decides which copy is kept: the first, whichever worker encoded it. Each
    digest has the number of its document among all that were checked, so that after a kill the
    entries after the last mark are removed.
    """

    def __init__(self, prefix: str | Path, checked: int = 0) -> None:
        """Continue after the first ``checked`` documents; 0: start."""
        self.path = seen_path(prefix)
        if checked == 0:
            self.path.unlink(missing_ok=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.checked = checked
        self._table = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        for setting in (f"cache_size = -{CACHE_KIB}", "synchronous = FULL"):
            self._table.execute(f"PRAGMA {setting}")
        self._table.execute(
            "CREATE TABLE IF NOT EXISTS seen (digest BLOB PRIMARY KEY, number INT) WITHOUT ROWID"
        )
        self._table.execute("BEGIN")
        self._table.execute("DELETE FROM seen WHERE number >= ?", (checked,))

    def are_new(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Find documents without an earlier copy: ``tokens`` [sum(lengths)] -> bool [documents]."""
        return np.fromiter(map(self.is_new, _digests(tokens, lengths)), bool, lengths.size)

    def mark(self) -> int:
        """Sync everything; return the number of documents checked so far."""
        self._table.execute("COMMIT")
        self._table.execute("BEGIN")
        return self.checked

    def close(self) -> None:
        """Close, discarding entries after the last mark."""
        self._table.close()

    def is_new(self, digest: bytes) -> bool:
        """Add a document's digest; return whether it was new."""
        statement = "INSERT OR IGNORE INTO seen VALUES (?, ?)"
        added = self._table.execute(statement, (digest, self.checked)).rowcount
        self.checked += 1
        return added == 1


def seen_path(prefix: str | Path) -> Path:
    """Return ``PREFIX.seen.tmp``."""
    return beside(prefix, ".seen.tmp")


def begin_digest() -> "hashlib.blake2b":
    """Return a hash to update with a document's ids as bytes of the shard's dtype."""
    return hashlib.blake2b(digest_size=DIGEST_BYTES)


def _digests(tokens: np.ndarray, lengths: np.ndarray) -> Iterable[bytes]:
    """Yield a digest of each document's ids."""
    payload, end = np.ascontiguousarray(tokens).view(np.uint8).data, 0
    for size in (lengths * tokens.itemsize).tolist():
        end += size
        digest = begin_digest()
        digest.update(payload[end - size : end])
        yield digest.digest()
