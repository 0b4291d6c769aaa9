"""Write a token shard: bounded memory, atomic, hashed while writing."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from moetron.common.files import begin_sync, beside, open_at, rename, sync
from moetron.data.shards.indexed_format import (
    HEADER,
    LENGTH,
    MAGIC,
    POINTER,
    VERSION,
    dtype_code,
    token_dtype,
)
from moetron.data.shards.manifest import FileRecord, manifest_path

BLOCK = 1 << 20  # documents whose index entries are computed at once
HASH_BLOCK_BYTES = 1 << 22


def temporary_paths(prefix: str | Path) -> tuple[Path, Path, Path]:
    """Return the temporary paths of tokens, index and document lengths."""
    return beside(prefix, ".bin.tmp"), beside(prefix, ".idx.tmp"), beside(prefix, ".lengths.tmp")


class ShardWriter:
    """Writer that appends documents to ``PREFIX.bin`` and writes ``PREFIX.idx`` in ``finish``.

    No file has its final name before ``finish``. Data written before ``mark`` survives a crash: a
    new writer continues from there. Document lengths are kept in a file, not in memory.
    """

    def __init__(
        self, prefix: str | Path, vocab_size: int, documents: int = 0, tokens: int = 0
    ) -> None:
        """Open the files; ``documents`` and ``tokens``: counts at an earlier writer's last mark."""
        self.prefix = Path(prefix)
        self.dtype = token_dtype(vocab_size)
        self.documents = documents
        self.tokens = tokens
        self.max_id: int | None = None
        """Largest token id so far."""
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._bin_path, self._idx_path, self._lengths_path = temporary_paths(prefix)
        self._bin = open_at(self._bin_path, tokens * self.dtype.itemsize)
        self._lengths = open_at(self._lengths_path, documents * LENGTH.itemsize)
        self._bin_hash = hashlib.sha256()
        self._hash_kept_tokens()
        self._begun_bytes = tokens * self.dtype.itemsize

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents: ``tokens`` [sum(lengths)] of the shard's dtype, ``lengths`` [N]."""
        assert tokens.dtype == self.dtype and int(lengths.sum()) == tokens.size
        payload = np.ascontiguousarray(tokens).data
        self._bin.write(payload)
        self._begun_bytes = begin_sync(self._bin, self._begun_bytes)
        self._bin_hash.update(payload)
        self._note(tokens)
        self._lengths.write(lengths.astype(LENGTH).tobytes())
        self.documents += lengths.size
        self.tokens += tokens.size

    @contextmanager
    def document(self) -> Iterator[Callable[[np.ndarray], None]]:
        """Append one document part by part with the yielded function.

        If the block raises, the document is removed again.
        """
        start, digest, max_id, size = self._bin.tell(), self._bin_hash.copy(), self.max_id, 0

        def append(tokens: np.ndarray) -> None:
            nonlocal size
            assert tokens.dtype == self.dtype
            self._bin.write(tokens.data)
            self._bin_hash.update(tokens.data)
            self._note(tokens)
            size += tokens.size

        try:
            yield append
        except BaseException:
            self._bin.seek(start)
            self._bin.truncate()
            self._bin_hash, self.max_id = digest, max_id
            raise
        self._lengths.write(np.array([size], LENGTH).tobytes())
        self.documents += 1
        self.tokens += size

    def mark(self) -> dict[str, int]:
        """Sync all files; return the bytes that a successor needs, by file."""
        sync(self._bin)
        sync(self._lengths)
        return self.sizes(self.prefix, self.documents, self.tokens)

    def sizes(self, prefix: str | Path, documents: int, tokens: int) -> dict[str, int]:
        """Return the bytes in the temporary files of so many documents and tokens, by file."""
        bin_path, _, lengths_path = temporary_paths(prefix)
        return {
            str(bin_path): tokens * self.dtype.itemsize,
            str(lengths_path): documents * LENGTH.itemsize,
        }

    def close(self) -> None:
        """Close the temporary files and keep them for a successor."""
        self._bin.close()
        self._lengths.close()

    def finish(self) -> tuple[FileRecord, FileRecord]:
        """Write the index, sync, and rename both files; return the records of .bin and .idx.

        The manifest of an earlier shard at this prefix is removed first, because it does not
        describe the new files. The caller writes the new one.
        """
        idx_hash = self._write_index()
        sync(self._bin)
        bin_bytes, idx_bytes = self._bin_path.stat().st_size, self._idx_path.stat().st_size
        manifest_path(self.prefix).unlink(missing_ok=True)
        rename(self._bin_path, beside(self.prefix, ".bin"))
        rename(self._idx_path, beside(self.prefix, ".idx"))
        self._lengths_path.unlink()
        return (
            FileRecord(bytes=bin_bytes, sha256=self._bin_hash.hexdigest()),
            FileRecord(bytes=idx_bytes, sha256=idx_hash),
        )

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _hash_kept_tokens(self) -> None:
        """Hash the tokens that an earlier writer left, and find the largest."""
        self._bin.seek(0)
        while block := self._bin.read(HASH_BLOCK_BYTES):
            self._bin_hash.update(block)
            self._note(np.frombuffer(block, self.dtype))

    def _note(self, tokens: np.ndarray) -> None:
        """Keep the largest id."""
        if tokens.size:
            largest = int(tokens.max())
            self.max_id = largest if self.max_id is None else max(self.max_id, largest)

    def _write_index(self) -> str:
        """Write the index block by block; return its SHA-256."""
        digest = hashlib.sha256()
        with self._idx_path.open("wb") as file:

            def put(data: bytes) -> None:
                file.write(data)
                digest.update(data)

            code, documents = dtype_code(self.dtype), self.documents
            put(HEADER.pack(MAGIC, VERSION, code, documents, documents + 1))
            for lengths in self._length_blocks():
                put(lengths.tobytes())
            start = 0
            for lengths in self._length_blocks():
                ends = start + np.cumsum(lengths, dtype=POINTER) * self.dtype.itemsize
                put((ends - lengths.astype(POINTER) * self.dtype.itemsize).tobytes())
                start = int(ends[-1])
            for first in range(0, documents + 1, BLOCK):
                put(np.arange(first, min(first + BLOCK, documents + 1), dtype=POINTER).tobytes())
            sync(file)
        return digest.hexdigest()

    def _length_blocks(self) -> Iterator[np.ndarray]:
        """Yield the document lengths written so far, int32 [<= BLOCK] at a time."""
        self._lengths.seek(0)
        while block := self._lengths.read(BLOCK * LENGTH.itemsize):
            yield np.frombuffer(block, dtype=LENGTH)
