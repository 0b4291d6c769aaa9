"""Read rows of Parquet and Arrow files, including saved HuggingFace datasets, with pyarrow."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moetron.common.errors import UserError, unreadable
from moetron.data.readers.chunks import Cursor, TableChunk

TABLE_SUFFIXES = {".parquet", ".arrow"}
BATCH_ROWS = 1024


def table_chunks(
    file: Path, start: Cursor, columns: Sequence[str], chunk_bytes: int
) -> Iterator[TableChunk]:
    """Yield rows of one file from ``start``, at most about ``chunk_bytes`` at a time.

    Only the named columns that the file has are read; none named: all. Raises UserError if it
    cannot be read.
    """
    import pyarrow

    size, line, read_bytes = file.stat().st_size, 1, 0
    try:
        rows, batches = _open(file, columns)
        for batch in batches:
            step = max(1, batch.num_rows * chunk_bytes // max(batch.nbytes, 1))
            first = min(max(start.line - line, 0), batch.num_rows)
            for at in range(first, batch.num_rows, step):
                part = batch.slice(at, step)
                end = line + at + part.num_rows
                done_bytes = size * (end - 1) // max(rows, 1)
                cursor = Cursor(start.file, line=end)
                yield TableChunk(str(file), line + at, part, done_bytes - read_bytes, cursor)
                read_bytes = done_bytes
            line += batch.num_rows
            read_bytes = size * (line - 1) // max(rows, 1)
    except (pyarrow.ArrowException, OSError) as error:
        raise unreadable(file, error) from None


def _open(file: Path, columns: Sequence[str]) -> tuple[int, Iterator[Any]]:
    """Return (number of rows, batches) of a file."""
    if file.suffix.lower() == ".parquet":
        from pyarrow import parquet

        table = parquet.ParquetFile(file, memory_map=True)
        present = _present(file, columns, table.schema_arrow.names)
        chosen = present if columns else None
        return table.metadata.num_rows, table.iter_batches(BATCH_ROWS, columns=chosen)
    rows = sum(batch.num_rows for batch in _arrow_batches(file))
    batches = _arrow_batches(file)
    if not columns:
        return rows, batches
    return rows, (batch.select(_present(file, columns, batch.schema.names)) for batch in batches)


def _present(file: Path, columns: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the columns that a file has; UserError if it has one twice."""
    if twice := [name for name in columns if names.count(name) > 1]:
        raise UserError(f"{file}: has the column {twice[0]!r} twice; rename one")
    return [name for name in columns if name in names]


def _arrow_batches(file: Path) -> Iterator[Any]:
    """Yield record batches of an Arrow file or stream file, mapped."""
    import pyarrow

    with pyarrow.memory_map(str(file)) as source:
        if source.read(6) == b"ARROW1":
            reader = pyarrow.ipc.open_file(source)
            yield from map(reader.get_batch, range(reader.num_record_batches))
        else:
            source.seek(0)
            yield from pyarrow.ipc.open_stream(source)
