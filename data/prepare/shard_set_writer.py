"""Write one output as one shard or a shard set."""

from collections.abc import Iterator

import numpy as np

from moetron.common.files import beside
from moetron.data.encoding.duplicates import Seen, begin_digest, seen_path
from moetron.data.encoding.encode import Documents
from moetron.data.encoding.long_documents import LeftOut, LongDocument
from moetron.data.prepare.journal import Part, Side
from moetron.data.shards.manifest import FileRecord
from moetron.data.shards.shard_set import member, numbered, shard_prefixes
from moetron.data.shards.shard_writer import ShardWriter, temporary_paths


class ShardSetWriter:
    """Writer that appends documents to a shard set; without a size, to one shard.

    A shard ends with the document that brings it to ``shard_size_tokens``, so that the split
    depends only on the documents. No file has its final name before ``finish``; data written
    before ``mark`` survives a crash.
    """

    def __init__(
        self,
        prefix: str,
        vocab_size: int,
        side: Side,
        shard_size_tokens: int | None = None,
        deduplicate: bool = False,
    ) -> None:
        """Resume from ``side``, which is updated from here."""
        self.prefix, self.side = prefix, side
        self._vocab_size, self._size = vocab_size, shard_size_tokens
        self._seen = Seen(prefix, side.asked) if deduplicate else None
        self._writer = self._open(len(side.parts) - 1)

    def add(self, documents: Documents) -> int:
        """Append documents; return how many were dropped as duplicates."""
        tokens, lengths, text_bytes = documents.tokens, documents.lengths, documents.text_bytes
        duplicates = 0
        if self._seen is not None:
            new = self._seen.are_new(tokens, lengths)
            duplicates = int(np.count_nonzero(~new))
            tokens, lengths = tokens[np.repeat(new, lengths)], lengths[new]
            text_bytes = text_bytes[new]
        while lengths.size:
            count = self._fitting(lengths)
            ids = int(lengths[:count].sum())
            self._append(Documents(tokens[:ids], lengths[:count], text_bytes[:count]))
            tokens, lengths, text_bytes = tokens[ids:], lengths[count:], text_bytes[count:]
        return duplicates

    def add_long(self, document: LongDocument) -> None:
        """Append a document that is encoded while it is written.

        Raises LeftOut or Unreadable, and restores the state before, if the document is dropped.
        """
        self._next_if_full()
        digest = begin_digest()
        try:
            with self._writer.document() as append:
                for tokens in document.tokens():
                    append(tokens)
                    digest.update(tokens.data)
                if self._seen is not None and not self._seen.is_new(digest.digest()):
                    raise LeftOut("duplicate")
        except BaseException:
            self._back_if_empty()
            raise
        part = self.side.parts[-1]
        part.documents, part.tokens = self._writer.documents, self._writer.tokens
        part.text_bytes += document.text_bytes

    def mark(self) -> dict[str, int]:
        """Sync everything; return the bytes that a successor needs, by file."""
        sizes = self._writer.mark()
        if self._seen is not None:
            self.side.asked = self._seen.mark()
            sizes[str(self._seen.path)] = 0
        for number, part in enumerate(self.side.parts[:-1]):
            sizes |= self._writer.sizes(self._name(number), part.documents, part.tokens)
        return sizes

    def finish(self) -> Iterator[tuple[str, Part, int | None, FileRecord, FileRecord]]:
        """Rename each shard's files; yield (prefix, counts, largest id, records of both files)."""
        last = len(self.side.parts) - 1
        for number, part in enumerate(self.side.parts):
            with self._writer if number == last else self._open(number) as writer:
                yield self._name(number), part, writer.max_id, *writer.finish()
        for prefix in shard_prefixes(self.prefix)[last + 1 :] if self._size is not None else ():
            for suffix in (".json", ".idx", ".bin"):  # of an earlier run with more shards
                beside(prefix, suffix).unlink(missing_ok=True)

    def close(self) -> None:
        """Close the temporary files and keep them for a successor."""
        self._writer.close()
        if self._seen is not None:
            self._seen.close()

    @property
    def dtype(self) -> np.dtype:
        """Return the dtype of the token ids."""
        return self._writer.dtype

    def _fitting(self, lengths: np.ndarray) -> int:
        """Return how many documents the current shard takes; start a new one if it is full."""
        if self._size is None:
            return lengths.size
        self._next_if_full()
        room = self._size - self._writer.tokens
        return int(np.searchsorted(np.cumsum(lengths), room)) + 1

    def _next_if_full(self) -> None:
        """Start a new shard if the current one has reached its size."""
        if self._size is not None and self._writer.tokens >= self._size:
            self._writer.mark()
            self._writer.close()
            self.side.parts.append(Part())
            self._writer = self._open(len(self.side.parts) - 1)

    def _back_if_empty(self) -> None:
        """Return to the previous shard if the new one is empty."""
        if len(self.side.parts) > 1 and self._writer.documents == 0:
            self._writer.close()
            self.side.parts.pop()
            for path in temporary_paths(self._name(len(self.side.parts))):
                path.unlink(missing_ok=True)
            self._writer = self._open(len(self.side.parts) - 1)

    def _append(self, documents: Documents) -> None:
        """Append to the current shard."""
        part = self.side.parts[-1]
        self._writer.add(documents.tokens, documents.lengths)
        part.documents, part.tokens = self._writer.documents, self._writer.tokens
        part.text_bytes += int(documents.text_bytes.sum())

    def _open(self, number: int) -> ShardWriter:
        """Open the writer of one shard."""
        part = self.side.parts[number]
        return ShardWriter(self._name(number), self._vocab_size, part.documents, part.tokens)

    def _name(self, number: int) -> str:
        """Return the prefix of one shard."""
        return self.prefix if self._size is None else member(self.prefix, number)


def discard_temporary(prefix: str) -> None:
    """Remove the temporary files of an unfinished run."""
    seen = seen_path(prefix)
    paths = [seen, beside(seen, "-journal"), *temporary_paths(prefix)]
    for suffix in (".bin.tmp", ".idx.tmp", ".lengths.tmp"):
        paths += [beside(name, suffix) for name in numbered(prefix, suffix)]
    for path in paths:
        path.unlink(missing_ok=True)
