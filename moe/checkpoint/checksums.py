"""SHA-256 of a checkpoint's files, in the format of ``sha256sum --check``.

A flipped bit is found in any file: in a listed one because its sum differs, in the list itself
because it no longer matches the files. Nothing here communicates or imports torch.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from moetron.common.files import read_regular, sha256_of, write_text

SUMS = "SHA256SUMS"
THREADS = 2
"""Files that a rank reads at once."""
_WRITER = re.compile(r"__(\d+)_")
"""Start of the name of a file with tensors, with the rank that wrote it."""
Known: TypeAlias = Mapping[str, str] | None
"""Sums of files that need not be read again."""
_LINE = re.compile(r"([0-9a-f]{64})  (\S+)")


@dataclass(frozen=True)
class Sums:
    """SHA-256 of files that are summed while their tensors are read."""

    wanted: Collection[str] = ()
    """Names of files to sum."""
    found: dict[str, str] = field(default_factory=dict)
    """Sums by name, of those that were read."""


def write_sums(folder: Path, known: Mapping[str, str]) -> None:
    """List every other file below ``folder``; ``known`` are sums taken while writing."""
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    sums = {name: known.get(name) or sha256_of(folder / name) for name in sorted(names - {SUMS})}
    write_text(folder / SUMS, "".join(f"{sum_}  {name}\n" for name, sum_ in sums.items()))


def read_sums(folder: Path) -> dict[str, str]:
    """Return the listed files and their sums.

    Raises:
        ValueError: the list is missing or malformed.
    """
    try:
        *lines, end = read_regular(folder / SUMS).decode("ascii").split("\n")
    except FileNotFoundError:
        raise ValueError(f"{SUMS} is missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{SUMS} cannot be read: {error}") from error
    matches = [_LINE.fullmatch(line) for line in lines]
    sums = {match[2]: match[1] for match in matches if match}
    if len(sums) < len(lines) or end:
        raise ValueError(f"{SUMS} is not a list of sums")
    return sums


def share(sizes: Mapping[str, int], reader: int, readers: int) -> list[str]:
    """Return the files that reader number ``reader`` of ``readers`` sums.

    In the layout that wrote a checkpoint a rank reads most of the tensors that it wrote itself.
    """
    shares: list[list[str]] = [[] for _ in range(readers)]
    largest_first = sorted(sizes, key=lambda name: (-sizes[name], name))
    others = [name for name in largest_first if _WRITER.match(name) is None]
    for name in sizes.keys() - set(others):
        shares[int(_WRITER.match(name)[1]) % readers].append(name)  # type: ignore[index]
    return sorted(shares[reader]) + others[reader::readers]


def changed(folder: Path, names: Iterable[str], known: Known = None) -> list[str]:
    """Read the files ``names``; return those whose contents differ from what was written.

    Args:
        folder: with the list of sums.
        names: files in it.
        known: sums of files that have been read already.

    Raises:
        ValueError: the list is missing or malformed.
    """
    sums, names, known = read_sums(folder), list(names), known or {}
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda name: known.get(name) or sha256_of(folder / name), names))
    return [name for name, sum_ in zip(names, found, strict=True) if sums.get(name) != sum_]
