"""The shards of one output: ``NAME_00000``, ``NAME_00001``, ..."""

import re
from pathlib import Path

from moetron.common.errors import UserError
from moetron.common.files import beside
from moetron.data.shards.manifest import read_manifest

DIGITS = 5
_WRITTEN = re.compile(
    rf"(\.share-\d+-of-\d+(\.text-bytes)?|_\d{{{DIGITS}}})?"
    r"(\.(bin|idx|json|lengths|seen|rejects\.jsonl|progress\.json)(\.tmp(-journal)?)?"
    r"|\.lock|\.stdin\.jsonl)"
)


def member(prefix: str, number: int) -> str:
    """The prefix of one shard."""
    return f"{prefix}_{number:0{DIGITS}}"


def family(prefix: str | Path) -> list[str]:
    """The prefixes ``PREFIX_00000``, ... whose index is there, in order."""
    return numbered(prefix, ".idx")


def members(prefix: str) -> list[str]:
    """``prefix`` itself, or the shards of the family that bears its name.

    Raises UserError if shards of the family are missing.
    """
    found = family(prefix)
    if not found or beside(prefix, ".idx").exists():
        return [prefix]
    manifest = read_manifest(found[0])
    expected = manifest.shards if manifest else len(found)
    names = [member(prefix, number) for number in range(expected)]
    if found != names:
        missing = sorted(set(names) - set(found)) or sorted(set(found) - set(names))
        raise UserError(f"{prefix}: {expected} shards, but not as found: {', '.join(missing)}")
    return found


def is_written_with(file: Path, prefix: str | Path) -> bool:
    """Whether runs with this prefix, or shares of them, write a file of this name."""
    path = Path(prefix)
    if not file.name.startswith(path.name) or file.parent.resolve() != path.parent.resolve():
        return False
    return _WRITTEN.fullmatch(file.name[len(path.name) :]) is not None


def numbered(prefix: str | Path, suffix: str) -> list[str]:
    """``PREFIX_00000``, ... for which a file with the suffix is there, in order."""
    path = Path(prefix)
    pattern = re.compile(rf"{re.escape(path.name)}_\d{{{DIGITS}}}{re.escape(suffix)}")
    if not path.parent.is_dir():
        return []
    names = [file.name for file in path.parent.iterdir() if pattern.fullmatch(file.name)]
    return [str(path.with_name(name.removesuffix(suffix))) for name in sorted(names)]
