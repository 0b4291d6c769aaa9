"""Partitions of a corpus: each is preprocessed by its own process, then all are merged.

A partition is a range of files. Beside its tokens it keeps the text bytes of each document, as a
shard of one number a document, so the merger can split, count and compare documents like a single
run, and writes the same bytes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson

from moetron.common.errors import UserError
from moetron.common.files import beside
from moetron.data.encoding.encode import Documents, Encoded
from moetron.data.readers.chunks import Cursor, Reject
from moetron.data.shards.manifest import manifest_path
from moetron.data.shards.shard import Shard

SIZES_VOCAB = 1 << 31
"""Upper bound of document sizes, in bytes."""
BLOCK_DOCUMENTS = 1 << 14


@dataclass(frozen=True)
class Partition:
    """Partition ``number`` (from 0) of ``count``."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Partition":
        """Parse ``I/N``; UserError if it is something else."""
        number, _, count = text.partition("/")
        if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
            raise UserError(f"--share {text}: must be I/N with 0 <= I < N, such as 0/16")
        return cls(int(number), int(count))

    def select(self, files: Sequence[Path]) -> list[Path]:
        """Return the files of this partition: consecutive, with about equal bytes per partition."""
        sizes = np.array([file.stat().st_size for file in files], np.int64)
        middles = np.cumsum(sizes) - sizes / 2
        owners = middles * self.count // max(int(sizes.sum()), 1)
        return [file for file, owner in zip(files, owners, strict=True) if owner == self.number]

    def prefix(self, output: str) -> str:
        """Return the prefix of this partition of an output."""
        return f"{output}.share-{self.number:05}-of-{self.count:05}"


def sizes_prefix(prefix: str) -> str:
    """Return the prefix of the text bytes of a partition's documents."""
    return f"{prefix}.text-bytes"


def with_sizes(encoded: Encoded, outputs: int) -> Encoded:
    """Add the text bytes of each side's documents after the first ``outputs`` sides."""
    sides = encoded.sides[:outputs]
    return Encoded(
        (*sides, *(sizes(side.text_bytes) for side in sides)),
        encoded.rejects,
        encoded.left_out,
        encoded.read_bytes,
        encoded.end,
    )


def sizes(text_bytes: np.ndarray) -> Documents:
    """Return text bytes [documents] as documents of one number each."""
    count = text_bytes.size
    return Documents(
        text_bytes.astype(np.int32), np.ones(count, np.int64), np.zeros(count, np.int64)
    )


def read_partition(prefixes: Sequence[str]) -> Iterator[Encoded]:
    """Yield a partition as if it had just been encoded; ``prefixes`` of its outputs."""
    manifest = Shard(prefixes[0]).manifest
    assert manifest is not None
    left_out = {name: n for name, n in manifest.filters.items() if name != "rejected"}
    rejects_path = beside(prefixes[0], ".rejects.jsonl")
    lines = rejects_path.read_bytes().splitlines() if rejects_path.exists() else []
    rejects = [Reject(**orjson.loads(line)) for line in lines]
    yield Encoded((), rejects, left_out, 0, Cursor())
    for side, prefix in enumerate(prefixes):
        for documents in _blocks(prefix):
            none = Documents(documents.tokens[:0], documents.lengths[:0], documents.text_bytes[:0])
            yield Encoded((none,) * side + (documents,), [], {}, 0, Cursor())


def remove_partition(prefixes: Sequence[str]) -> None:
    """Delete the files of a partition."""
    beside(prefixes[0], ".rejects.jsonl").unlink(missing_ok=True)
    for prefix in prefixes:
        for each in (prefix, sizes_prefix(prefix)):
            manifest_path(each).unlink(missing_ok=True)
            for suffix in (".idx", ".bin"):
                beside(each, suffix).unlink(missing_ok=True)


def _blocks(prefix: str) -> Iterator[Documents]:
    """Yield the documents of a shard, ``BLOCK_DOCUMENTS`` at a time."""
    shard, sizes = Shard(prefix), Shard(sizes_prefix(prefix)).tokens
    end = 0
    for first in range(0, len(shard), BLOCK_DOCUMENTS):
        lengths = shard.document_lengths[first : first + BLOCK_DOCUMENTS].astype(np.int64)
        start, end = end, end + int(lengths.sum())
        text_bytes = sizes[first : first + BLOCK_DOCUMENTS].astype(np.int64)
        yield Documents(np.asarray(shard.tokens[start:end]), lengths, text_bytes)
