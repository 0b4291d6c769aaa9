"""Texts with the names of their sources."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from moetron.data.readers.chunks import FileChunk, LongChunk, Reject
from moetron.data.readers.long_rows import LongText, Unreadable
from moetron.data.readers.rows import read_chunks


def labelled_texts(paths: Sequence[Path], text_key: str) -> Iterator[tuple[str, str]]:
    """Yield (source, text) of every readable row or file; each JSONL file or folder is a source.

    Rows without usable text are skipped: preprocess_corpus lists and limits them.
    """
    for chunk in read_chunks(paths, columns=[text_key]):
        if isinstance(chunk, FileChunk):
            source = Path(chunk.files[0][0]).parent.name
        else:
            source = Path(chunk.file).stem
        if isinstance(chunk, LongChunk):
            yield from ((source, text) for text in _parts(chunk, text_key))
            continue
        for document in chunk.documents(text_key):
            if not isinstance(document, Reject):
                yield source, document[0]


def _parts(chunk: LongChunk, text_key: str) -> Iterator[str]:
    """Yield the readable parts of a text too long to hold in memory."""
    with suppress(Unreadable):
        yield from LongText(chunk, text_key).blocks()
