"""Encode chunks in threads, processes or on a Ray cluster; the results are the same."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from moetron.data.encoding.encode import Encoded, Encoding, encode_chunk, open_tokenizer
from moetron.data.encoding.long_documents import LongDocument
from moetron.data.prepare.ray_engine import ray_map
from moetron.data.prepare.worker_pool import ordered_map
from moetron.data.readers import rows as inputs
from moetron.data.readers.chunks import Chunk, Cursor, LongChunk
from moetron.tokenizers.fast_bpe import open_fast
from moetron.tokenizers.interface import Tokenizer

FAST_CHUNKS = 4
"""Chunks combined for the fast engine, whose call overhead would otherwise count."""
FAST_THREADS = 8
"""Most threads; with more workers, processes are used, because Python code is serial."""


def encoded_chunks(
    files: Sequence[Path],
    start: Cursor,
    encoding: Encoding,
    tokenizer: Tokenizer,
    workers: int,
    engine: str = "local",
) -> Iterator[Encoded | LongDocument]:
    """Encode the files from ``start``, in order; ``tokenizer`` is the reference.

    Documents too long to hold in memory are encoded in this process, while they are written.

    Raises EnginesDiffer if the fast engine does not give the reference's ids.
    """
    local = engine == "local"
    few = local and workers <= FAST_THREADS
    fast = open_fast(tokenizer, workers) if few and encoding.fast else None
    here = fast or tokenizer
    threads = few and workers > 1 and here.concurrent
    known = here if threads or (local and workers == 1) else None
    chunk_bytes = inputs.CHUNK_BYTES * (FAST_CHUNKS if fast else 1)
    columns = (encoding.text_key, *encoding.filters.row_keys)
    chunks = inputs.read_chunks(files, start, chunk_bytes, columns)

    def weigh(chunk: Chunk) -> float:
        return max(1.0, chunk.size_bytes / chunk_bytes)

    encode = partial(encode_chunk, encoding, tokenizer=known)
    results = (
        ordered_map(encode, chunks, workers, weigh, threads)
        if local
        else ray_map(encode, chunks, workers, weigh)
    )
    for made in results:
        if isinstance(made, LongChunk):
            yield LongDocument(encoding, made, known or open_tokenizer(encoding))
        else:
            yield made
