"""Shard sets: the shards ``NAME_00000``, ``NAME_00001``, ... of one output."""

import re
from pathlib import Path

from moetron.common.errors import UserError
from moetron.common.files import beside
from moetron.data.shards.manifest import read_manifest

DIGITS = 5
"""Of a number in a name; from 100,000 on there are more."""
_WRITTEN = re.compile(
    rf"(\.share-\d+-of-\d+(\.text-bytes)?|_\d{{{DIGITS},}})?"
    r"(\.(bin|idx|json|lengths|seen|rejects\.jsonl|progress\.json)(\.tmp(-journal)?)?"
    r"|\.lock|\.stdin\.jsonl)"
)


def member(prefix: str, number: int) -> str:
    """Return the prefix of one shard."""
    return f"{prefix}_{number:0{DIGITS}}"


def shard_prefixes(prefix: str | Path) -> list[str]:
    """Return the prefixes ``PREFIX_00000``, ... with an index file, in order."""
    return numbered(prefix, ".idx")


def members(prefix: str) -> list[str]:
    """Return ``prefix`` itself, or the prefixes of its shard set.

    Raises UserError if shards of the set are missing.
    """
    found = shard_prefixes(prefix)
    if not found or beside(prefix, ".idx").exists():
        return [prefix]
    manifest = read_manifest(found[0])
    expected = manifest.shards if manifest else len(found)
    names = [member(prefix, number) for number in range(expected)]
    if found != names:
        missing = sorted(set(names) - set(found)) or sorted(set(found) - set(names))
        raise UserError(
            f"{prefix}: {expected} shards expected; missing or extra: {', '.join(missing)}"
        )
    return found


def is_written_with(file: Path, prefix: str | Path) -> bool:
    """Return whether runs with this prefix, or their partitions, write a file of this name."""
    path = Path(prefix)
    if not file.name.startswith(path.name) or file.parent.resolve() != path.parent.resolve():
        return False
    return _WRITTEN.fullmatch(file.name[len(path.name) :]) is not None


def numbered(prefix: str | Path, suffix: str) -> list[str]:
    """Return ``PREFIX_00000``, ... for which a file with the suffix exists, in order."""
    path = Path(prefix)
    pattern = re.compile(rf"{re.escape(path.name)}_\d{{{DIGITS},}}{re.escape(suffix)}")
    if not path.parent.is_dir():
        return []
    names = [file.name for file in path.parent.iterdir() if pattern.fullmatch(file.name)]
    in_order = sorted(names, key=lambda name: (len(name), name))
    return [str(path.with_name(name.removesuffix(suffix))) for name in in_order]
