"""Range of the token ids in shards, without reading those whose manifest states it."""

import os
from collections.abc import Sequence

import orjson

from moetron.common.errors import UserError
from moetron.common.files import atomic_file, beside
from moetron.data.shards.shard import Shard, scanned_range


def refuse_ids_outside(shards: Sequence[Shard], vocab_size: int) -> None:
    """Raise UserError that names all shards with an id below 0 or from ``vocab_size`` on.

    Rank 0 alone looks, since thousands of ranks may share a disk. Shards without a largest id in
    their manifest are read once; ``PREFIX.ids.json`` keeps what was found, if it can be written.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    wrong = []
    for shard in shards:
        smallest, largest = id_range(shard)
        if smallest < 0 or largest >= vocab_size:
            wrong.append(f"{shard.prefix} (ids {smallest} to {largest})")
    if wrong:
        raise UserError(
            f"token ids outside the vocabulary of {vocab_size}: {', '.join(wrong)}; use the "
            "tokenizer of the shards, a larger --vocab-size, or preprocess again"
        )


def id_range(shard: Shard) -> tuple[int, int]:
    """Return the smallest and largest id: of the manifest, of an earlier reading, or read now."""
    if shard.manifest is not None and shard.manifest.max_id is not None:
        return 0, shard.manifest.max_id
    path, status = beside(shard.prefix, ".ids.json"), shard.bin_path.stat()
    identity = {"bytes": status.st_size, "modified_ns": status.st_mtime_ns}
    try:
        known = orjson.loads(path.read_bytes())
        if {name: known[name] for name in identity} == identity:
            return int(known["smallest"]), int(known["largest"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not read yet, or damaged: read the shard
    smallest, largest = scanned_range(shard.tokens)
    try:
        with atomic_file(path) as file:
            file.write(orjson.dumps({**identity, "smallest": smallest, "largest": largest}))
    except OSError:
        pass  # a folder that cannot be written: the next start reads the shard again
    return smallest, largest
