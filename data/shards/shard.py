"""Read a token shard: memory-mapped, checked when opened, at a cost independent of its size."""

import mmap
import os
from functools import lru_cache
from pathlib import Path

import numpy as np

from moetron.common.errors import UserError
from moetron.common.files import beside, sha256_of
from moetron.data.shards.indexed_format import (
    DTYPES,
    HEADER,
    LENGTH,
    MAGIC,
    POINTER,
    VERSION,
    index_bytes,
)
from moetron.data.shards.manifest import FileRecord, Manifest, read_manifest

SCAN_TOKENS = 1 << 24
"""Tokens read at once by `scanned_range`."""
MAPS = 256
"""Files that a process keeps mapped, those used last. Each takes a file descriptor and one of the
65,530 maps that Linux gives a process, and a run may have 100,000 shards."""


class Shard:
    """A ``.bin/.idx`` pair of Moetron or Megatron-LM.

    Opening checks the header and both sizes against each other and the manifest, in constant
    time, and keeps no file open: files are mapped when they are used. ``verify`` reads everything.
    """

    dtype: np.dtype
    """Type of the token ids."""
    token_count: int
    manifest: Manifest | None
    """None for a shard of another tool."""

    def __init__(self, prefix: str | Path, checked: bool = False) -> None:
        """Open a shard.

        Args:
            prefix: of its files.
            checked: another process checks the files; here a manifest is enough.

        Raises:
            UserError: the shard is missing, truncated or inconsistent; names the file.
        """
        self.prefix = str(prefix)
        self.bin_path, self.idx_path = beside(prefix, ".bin"), beside(prefix, ".idx")
        self.manifest = read_manifest(prefix)
        if checked and self.manifest is not None:
            self.dtype, self.token_count = np.dtype(self.manifest.dtype), self.manifest.tokens
            self._documents = self.manifest.documents
            self._bin_identity = (0, 0, self.manifest.bin.bytes)
            self._idx_identity = (0, 0, self.manifest.idx.bytes)
            return
        index, self._idx_identity = _map(self.idx_path, np.dtype(np.uint8))
        self.dtype, self._documents = _read_header(self.idx_path, index)
        tokens, self._bin_identity = _map(self.bin_path, self.dtype)
        self.token_count = len(tokens)
        self._check_sizes(*self._parts(index), tokens.nbytes)

    @property
    def tokens(self) -> np.ndarray:
        """Tokens of all documents in order: uint16 or int32 [T], mapped."""
        return _kept(self.bin_path, self.dtype, self._bin_identity)

    @property
    def document_lengths(self) -> np.ndarray:
        """Tokens of each document: int32 [documents], mapped."""
        return self._index()[0]

    def __len__(self) -> int:
        """Return the number of documents."""
        return self._documents

    def document(self, number: int) -> np.ndarray:
        """Return the tokens of one document, including its end-of-document token."""
        lengths, pointers, _ = self._index()
        start = int(pointers[number]) // self.dtype.itemsize
        return self.tokens[start : start + int(lengths[number])]

    def verify(self) -> list[str]:
        """Read everything and return all problems found."""
        problems = []
        counts, pointers, boundaries = self._index()
        lengths = counts.astype(np.int64) * self.dtype.itemsize
        if not np.array_equal(pointers, np.cumsum(lengths) - lengths):
            problems.append(f"{self.idx_path}: documents are not consecutive")
        if not np.array_equal(boundaries, np.arange(len(self) + 1)):
            problems.append(f"{self.idx_path}: the document boundaries are not 0, 1, 2, ...")
        if self.manifest is None:
            return [
                *problems,
                f"{self.prefix}.json: no manifest, so nothing to compare hashes with",
            ]
        recorded, found = self.manifest, (self.dtype.name, len(self), self.token_count)
        if (recorded.dtype, recorded.documents, recorded.tokens) != found:
            problems.append(f"{self.prefix}.json: dtype, documents or tokens are not the shard's")
        smallest, largest = scanned_range(self.tokens)
        if recorded.max_id is not None and largest != recorded.max_id:
            problems.append(f"{self.prefix}.json: the largest id is {largest}, not max_id")
        if smallest < 0 or largest >= recorded.tokenizer.vocab_size:
            problems.append(
                f"{self.bin_path}: ids from {smallest} to {largest}, but the tokenizer has "
                f"{recorded.tokenizer.vocab_size}"
            )
        for path, record in self._files(self.manifest):
            if sha256_of(path) != record.sha256:
                problems.append(f"{path}: its SHA-256 is not the manifest's")
        return problems

    def _index(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return lengths int32 [documents], offsets int64 [documents] and boundaries, mapped."""
        return self._parts(_kept(self.idx_path, np.dtype(np.uint8), self._idx_identity))

    def _parts(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        pointers_at = HEADER.size + self._documents * LENGTH.itemsize
        boundaries_at = pointers_at + self._documents * POINTER.itemsize
        return (
            index[HEADER.size : pointers_at].view(LENGTH),
            index[pointers_at:boundaries_at].view(POINTER),
            index[boundaries_at:].view(POINTER),
        )

    def _check_sizes(
        self, lengths: np.ndarray, pointers: np.ndarray, boundaries: np.ndarray, size: int
    ) -> None:
        """Compare the sizes of index, tokens (bytes) and manifest, in constant time."""
        documents = len(self)
        if boundaries[-1:].tolist() != [documents]:
            raise UserError(f"{self.idx_path}: the last document does not end the index")
        expected = 0
        if documents:
            expected = int(pointers[-1]) + int(lengths[-1]) * self.dtype.itemsize
        if size != expected:
            raise UserError(
                f"{self.bin_path}: {size} bytes, but its index expects {expected}; "
                "the shard is truncated or mixed with another; preprocess again"
            )
        for path, record in self._files(self.manifest) if self.manifest else ():
            if path.stat().st_size != record.bytes:
                raise UserError(
                    f"{path}: {path.stat().st_size} bytes, but its manifest says {record.bytes}; "
                    "the shard was changed afterwards; preprocess again"
                )

    def _files(self, manifest: Manifest) -> list[tuple[Path, FileRecord]]:
        """Return both files with their manifest records."""
        return [(self.bin_path, manifest.bin), (self.idx_path, manifest.idx)]


def scanned_range(tokens: np.ndarray) -> tuple[int, int]:
    """Return the smallest and largest of all ids [T], block by block; (0, -1) without tokens."""
    smallest, largest = 0, -1
    for start in range(0, len(tokens), SCAN_TOKENS):
        block = tokens[start : start + SCAN_TOKENS]
        smallest, largest = min(smallest, int(block.min())), max(largest, int(block.max()))
    return smallest, largest


Identity = tuple[int, int, int]
"""Inode, time of modification in ns and bytes of a file."""


def _map(path: Path, dtype: np.dtype) -> tuple[np.ndarray, Identity]:
    """Map a file read-only; UserError if it cannot be read or ends inside an item."""
    try:
        with path.open("rb", buffering=0) as file:  # np.memmap asks the file system twelve times
            status = os.fstat(file.fileno())
            size, identity = status.st_size, (status.st_ino, status.st_mtime_ns, status.st_size)
            if size % dtype.itemsize:
                raise UserError(
                    f"{path}: {size} bytes do not divide into {dtype} tokens; truncated?"
                )
            if size == 0:
                return np.empty(0, dtype), identity
            pages = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        return np.frombuffer(pages, dtype), identity
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; a data path is the prefix before .bin/.idx"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


@lru_cache(MAPS)
def _kept(path: Path, dtype: np.dtype, identity: Identity) -> np.ndarray:
    """Map a file that was checked before; its map closes when others took its place."""
    mapped, found = _map(path, dtype)
    if found[-1] != identity[-1]:
        raise UserError(f"{path}: {found[-1]} bytes now, {identity[-1]} when the run started")
    return mapped


def _read_header(path: Path, index: np.ndarray) -> tuple[np.dtype, int]:
    """Return (token dtype, number of sequences) of an index file: uint8 [bytes]."""
    if index.size < HEADER.size:
        raise UserError(f"{path}: {index.size} bytes are too few for an index; truncated?")
    magic, version, code, sequences, boundaries = HEADER.unpack(index[: HEADER.size].tobytes())
    if magic != MAGIC or version != VERSION or code not in DTYPES:
        raise UserError(f"{path}: not a Megatron index of version {VERSION} with integer tokens")
    if index.size != index_bytes(sequences, boundaries):
        raise UserError(
            f"{path}: {index.size} bytes, but {sequences} sequences need "
            f"{index_bytes(sequences, boundaries)}; truncated, or a multimodal index"
        )
    return DTYPES[code], sequences
