"""Texts with the name of the source that they belong to."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from moetron.data.inputs import RowChunk, read_chunks


def labelled_texts(paths: Sequence[Path], text_key: str) -> Iterator[tuple[str, str]]:
    """(source, text) of every readable row or file; a JSONL file or a folder of texts is a source.

    Rows without usable text are passed over: preprocess_corpus lists and limits them.
    """
    for chunk in read_chunks(paths):
        is_rows = isinstance(chunk, RowChunk)
        source = Path(chunk.file).stem if is_rows else Path(chunk.files[0][0]).parent.name
        for text in chunk.texts(text_key):
            if isinstance(text, str):
                yield source, text
