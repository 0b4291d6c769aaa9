"""Readers of common text files on a system.

Every reader takes a path (``.gz`` and ``.dz`` are unpacked) and returns the file's documents.
"""

import gzip
import re
import zlib
from collections.abc import Iterable
from pathlib import Path

BUNDLE_CHARACTERS = 2000
BLANK_LINES = re.compile(r"\n[ \t]*\n(?:[ \t]*\n)+")
TRAILING_SPACE = re.compile(r"[ \t]+$", re.MULTILINE)


def read_text(path: Path) -> str:
    """Read a file as UTF-8, else Latin-1; empty if it is binary or damaged."""
    content = path.read_bytes()
    if path.suffix in (".gz", ".dz"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error):
            return ""
    if b"\0" in content[:4096]:
        return ""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def tidy(text: str) -> str:
    """Remove trailing space and runs of blank lines."""
    text = TRAILING_SPACE.sub("", text.replace("\r\n", "\n"))
    return BLANK_LINES.sub("\n\n", text).strip("\n") + "\n"


def bundle(parts: Iterable[str], characters: int = BUNDLE_CHARACTERS) -> list[str]:
    """Join short texts, in order, into documents of about ``characters`` characters."""
    documents: list[str] = []
    held: list[str] = []
    size = 0
    for part in parts:
        held.append(part)
        size += len(part)
        if size >= characters:
            documents.append("\n".join(held))
            held, size = [], 0
    return [*documents, "\n".join(held)] if held else documents


def plain(path: Path) -> list[str]:
    """Read a file as one document."""
    return [tidy(read_text(path))]


def info(path: Path) -> list[str]:
    """Read the nodes of a GNU info file, without their headers and the index of nodes."""
    nodes = read_text(path).split("\x1f\n")[1:]
    texts = [node.partition("\n")[2] for node in nodes if node.startswith("File: ")]
    return bundle(map(tidy, texts))


def fortunes(path: Path) -> list[str]:
    """Read fortune cookies, several to a document."""
    return bundle(tidy(cookie) for cookie in read_text(path).split("\n%\n"))


DICTD_DIGITS = {
    digit: value
    for value, digit in enumerate(
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    )
}


def _dictd_number(digits: str) -> int:
    value = 0
    for digit in digits:
        value = value * 64 + DICTD_DIGITS[digit]
    return value


def dictd(path: Path) -> list[str]:
    """Read the entries of a dictd dictionary (``.dict.dz`` with ``.index`` beside it), bundled."""
    content = gzip.decompress(path.read_bytes())
    index = path.with_name(path.name.removesuffix(".dict.dz") + ".index")
    entries = set()
    for line in index.read_text(encoding="utf-8").splitlines():
        word, start, length = line.split("\t")[:3]
        if not word.startswith("00"):  # such as 00-database-info
            entries.add((_dictd_number(start), _dictd_number(length)))
    return bundle(
        tidy(content[start : start + length].decode(errors="replace"))
        for start, length in sorted(entries)
    )


def metamath(path: Path) -> list[str]:
    """Read the statements of a Metamath database with comments and proofs, bundled."""
    return bundle(read_text(path).split("\n\n"))
