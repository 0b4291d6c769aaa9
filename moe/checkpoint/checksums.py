"""SHA-256 of a checkpoint's files, in the format of ``sha256sum --check``.

A flipped bit is found in any file: in a listed one because its sum differs, in the list itself
because it no longer matches the files. Nothing here communicates or imports torch.
"""

import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from moetron.common.files import read_regular, sha256_of, write_text

SUMS = "SHA256SUMS"
THREADS = 2
"""Files that a rank reads at once."""
_LINE = re.compile(r"([0-9a-f]{64})  (\S+)")


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


def changed(folder: Path, names: Iterable[str]) -> list[str]:
    """Read the files ``names``; return those whose contents differ from what was written.

    Raises:
        ValueError: the list is missing or malformed.
    """
    sums, names = read_sums(folder), list(names)
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda name: sha256_of(folder / name), names))
    return [name for name, sum_ in zip(names, found, strict=True) if sums.get(name) != sum_]
