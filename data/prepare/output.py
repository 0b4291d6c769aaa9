"""Outputs of preprocessing: shards, the list of rejects, and the journal."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import orjson

from moetron.common.files import beside, open_at, rename, sync
from moetron.data.encoding.encode import Encoded
from moetron.data.encoding.long_documents import LeftOut, LongDocument
from moetron.data.prepare.journal import State, journal_path, write_state
from moetron.data.prepare.partitions import sizes
from moetron.data.prepare.shard_set_writer import ShardSetWriter, discard_temporary
from moetron.data.readers.chunks import Cursor, Reject
from moetron.data.readers.long_rows import Unreadable

JOURNAL_INTERVAL_S = 5.0
"""Most work lost by a kill."""
REJECT_REASONS_SHOWN = 3


class Output:
    """Temporary files of a run; every few seconds the journal records them."""

    def __init__(self, writers: Sequence[ShardSetWriter], state: State) -> None:
        """Resume from ``state``, which is updated from here."""
        self.state, self.writers = state, writers
        self.prefix = writers[0].prefix
        self.rejects_path = beside(self.prefix, ".rejects.jsonl")
        self._rejects_temporary = rejects_temporary(self.prefix)
        kept = state.sizes.get(str(self._rejects_temporary), 0)
        self._rejects = open_at(self._rejects_temporary, kept)
        self._last_mark_s = time.monotonic()

    def take(self, encoded: Encoded) -> None:
        """Append the documents of one chunk."""
        left_out = Counter(encoded.left_out)
        for writer, documents in zip(self.writers, encoded.sides, strict=False):
            if duplicates := writer.add(documents):
                left_out["duplicate"] += duplicates
        self.state.rows += encoded.rows
        self._take_rejects(encoded.rejects)
        self._record(left_out, encoded.read_bytes, encoded.end)

    def take_long(self, document: LongDocument, outputs: int) -> None:
        """Append a document that is encoded while it is written.

        ``outputs``: number of sides with tokens; the writers after them, if any, take text bytes.
        """
        chunk, left_out = document.chunk, Counter[str]()
        try:
            side = document.side()
            self.writers[side].add_long(document)
        except LeftOut as rule:
            left_out[str(rule)] += 1
        except Unreadable as error:
            self._take_rejects([Reject(chunk.file, chunk.line, str(error))])
        else:
            for writer in self.writers[outputs + side : outputs + side + 1]:
                writer.add(sizes(np.array([document.text_bytes])))
        self.state.rows += 1
        self._record(left_out, chunk.read_bytes, chunk.end)

    def _record(self, left_out: Mapping[str, int], read_bytes: int, end: Cursor) -> None:
        """Update the counts, and mark every ``JOURNAL_INTERVAL_S``."""
        state = self.state
        for name, count in left_out.items():
            state.left_out[name] = state.left_out.get(name, 0) + count
        state.read_bytes += read_bytes
        state.cursor = end
        if time.monotonic() - self._last_mark_s >= JOURNAL_INTERVAL_S:
            self.mark()

    def mark(self) -> None:
        """Sync everything and write the journal: a kill loses nothing before this point."""
        sync(self._rejects)
        self.state.sizes = {str(self._rejects_temporary): self._rejects.tell()}
        for writer in self.writers:
            self.state.sizes |= writer.mark()
        write_state(self.prefix, self.state)
        self._last_mark_s = time.monotonic()

    def finish_rejects(self) -> None:
        """Rename the list of rejects to its final name, if there are any."""
        sync(self._rejects)
        if self.state.rejected:
            rename(self._rejects_temporary, self.rejects_path)
        else:
            self.rejects_path.unlink(missing_ok=True)

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, *error: object) -> None:
        for writer in self.writers:
            writer.close()
        self._rejects.close()

    def _take_rejects(self, rejects: Sequence[Reject]) -> None:
        """Append to the list of rejects."""
        state = self.state
        state.rejected += len(rejects)
        state.reasons += rejects[: REJECT_REASONS_SHOWN - len(state.reasons)]
        for reject in rejects:
            self._rejects.write(orjson.dumps(asdict(reject)) + b"\n")


def rejects_temporary(prefix: str | Path) -> Path:
    """Return the temporary path of the list of rejects."""
    return beside(prefix, ".rejects.jsonl.tmp")


def discard(prefixes: Sequence[str]) -> None:
    """Remove the files that a run keeps for its successor, the journal first."""
    for path in (journal_path(prefixes[0]), rejects_temporary(prefixes[0])):
        path.unlink(missing_ok=True)
    for prefix in prefixes:
        discard_temporary(prefix)
