"""Write a token shard: bounded memory, atomic, hashed on the way."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from moetron.data.files import beside, replace
from moetron.data.indexed_format import (
    HEADER,
    LENGTH,
    MAGIC,
    POINTER,
    VERSION,
    dtype_code,
    token_dtype,
)
from moetron.data.manifest import FileRecord, manifest_path

BLOCK = 1 << 20  # documents whose index entries are made at once


class ShardWriter:
    """Appends documents to ``PREFIX.bin`` and builds ``PREFIX.idx`` when told to finish.

    Nothing bears its final name before ``finish``; leaving the ``with`` block without it removes
    what was written. Document lengths wait in a file, not in memory.
    """

    def __init__(self, prefix: str | Path, vocab_size: int) -> None:
        self.prefix = Path(prefix)
        self.dtype = token_dtype(vocab_size)
        self.documents = 0
        self.tokens = 0
        self._paths = {
            suffix: beside(prefix, f".{suffix}.tmp") for suffix in ("bin", "idx", "lengths")
        }
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._bin = self._paths["bin"].open("wb")
        self._lengths = self._paths["lengths"].open("w+b")
        self._bin_hash = hashlib.sha256()

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents: ``tokens`` [sum(lengths)] of the shard's dtype, ``lengths`` [N]."""
        assert tokens.dtype == self.dtype and int(lengths.sum()) == tokens.size
        payload = np.ascontiguousarray(tokens).data
        self._bin.write(payload)
        self._bin_hash.update(payload)
        self._lengths.write(lengths.astype(LENGTH).tobytes())
        self.documents += lengths.size
        self.tokens += tokens.size

    def finish(self) -> tuple[FileRecord, FileRecord]:
        """Write the index, sync, and give both files their names; records of .bin and .idx.

        A manifest that an earlier shard left at this prefix is removed first: it must not vouch
        for files that it does not describe. The caller writes the new one.
        """
        idx_hash = self._write_index()
        _sync(self._bin)
        sizes = {suffix: self._paths[suffix].stat().st_size for suffix in ("bin", "idx")}
        manifest_path(self.prefix).unlink(missing_ok=True)
        for suffix in ("bin", "idx"):
            replace(self._paths[suffix], beside(self.prefix, f".{suffix}"))
        return (
            FileRecord(bytes=sizes["bin"], sha256=self._bin_hash.hexdigest()),
            FileRecord(bytes=sizes["idx"], sha256=idx_hash),
        )

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bin.close()
        self._lengths.close()
        for path in self._paths.values():
            path.unlink(missing_ok=True)

    def _write_index(self) -> str:
        """Write the index beside the tokens, block by block; its SHA-256."""
        digest = hashlib.sha256()
        with self._paths["idx"].open("wb") as file:

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
            _sync(file)
        return digest.hexdigest()

    def _length_blocks(self) -> Iterator[np.ndarray]:
        """The document lengths written so far, int32 [<= BLOCK] at a time."""
        self._lengths.seek(0)
        while block := self._lengths.read(BLOCK * LENGTH.itemsize):
            yield np.frombuffer(block, dtype=LENGTH)


def _sync(file: BinaryIO) -> None:
    """Bring a file to the disk."""
    file.flush()
    os.fsync(file.fileno())
