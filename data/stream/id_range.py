"""Range of the token ids in shards, without reading those whose manifest states it."""

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import orjson

from moetron.common.errors import UserError
from moetron.common.files import atomic_file, beside
from moetron.data.shards.shard import Shard, scanned_range

logger = logging.getLogger(__name__)

THREADS = 8
"""Shards read at once."""
TOLD_BYTES = 1 << 34
"""Bytes to read from which on a line says so: minutes of waiting."""


def refuse_ids_outside(shards: Sequence[Shard], vocab_size: int) -> None:
    """Raise UserError that names all shards with an id below 0 or from ``vocab_size`` on.

    Rank 0 alone looks, since thousands of ranks may share a disk. Shards without a largest id in
    their manifest are read once; ``PREFIX.ids.json`` keeps what was found, if it can be written.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    ranges = [_stated(shard) for shard in shards]
    unread = [shard for shard, found in zip(shards, ranges, strict=True) if found is None]
    size_bytes = sum(shard.token_count * shard.dtype.itemsize for shard in unread)
    if size_bytes >= TOLD_BYTES:
        logger.warning(
            "reading %.3g GB of shards whose manifests state no largest id, once, to compare their "
            "ids with the vocabulary; ranks wait up to --distributed-timeout-minutes for this one, "
            "--check waits for none",
            size_bytes / 1e9,
        )
    with ThreadPoolExecutor(THREADS) as pool:  # NumPy's reductions run in parallel
        read = pool.map(_read_range, unread)
        ranges = [next(read) if found is None else found for found in ranges]
    wrong = [
        f"{shard.prefix} (ids {smallest} to {largest})"
        for shard, (smallest, largest) in zip(shards, ranges, strict=True)
        if smallest < 0 or largest >= vocab_size
    ]
    if wrong:
        raise UserError(
            f"token ids outside the vocabulary of {vocab_size}: {', '.join(wrong)}; use the "
            "tokenizer of the shards, a larger --vocab-size, or preprocess again"
        )


def id_range(shard: Shard) -> tuple[int, int]:
    """Return the smallest and largest id: of the manifest, of an earlier reading, or read now."""
    found = _stated(shard)
    return _read_range(shard) if found is None else found


def _read_range(shard: Shard) -> tuple[int, int]:
    identity = _identity(shard)
    smallest, largest = scanned_range(shard.tokens)
    try:
        with atomic_file(_path(shard)) as file:
            file.write(orjson.dumps({**identity, "smallest": smallest, "largest": largest}))
    except OSError:
        pass  # a folder that cannot be written: the next start reads the shard again
    return smallest, largest


def _stated(shard: Shard) -> tuple[int, int] | None:
    """Return the range of the manifest or of an earlier reading; None: it has to be read."""
    if shard.manifest is not None and shard.manifest.max_id is not None:
        return 0, shard.manifest.max_id
    try:
        known = orjson.loads(_path(shard).read_bytes())
        identity = _identity(shard)
        if {name: known[name] for name in identity} == identity:
            return int(known["smallest"]), int(known["largest"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not read yet, or damaged: read the shard
    return None


def _path(shard: Shard) -> Path:
    return beside(shard.prefix, ".ids.json")


def _identity(shard: Shard) -> dict[str, int]:
    status = shard.bin_path.stat()
    return {"bytes": status.st_size, "modified_ns": status.st_mtime_ns}
