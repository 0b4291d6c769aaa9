"""Corpora as JSONL: one ``{"text", "source", "id"}`` a line, a manifest beside the files."""

import glob
from collections.abc import Iterator, Sequence
from pathlib import Path

import orjson

from moetron.data.errors import DataError


def expand(patterns: Sequence[str]) -> list[Path]:
    """The files that the patterns match, sorted, each once; every pattern must match one."""
    found: set[Path] = set()
    for pattern in patterns:
        matches = map(Path, glob.glob(pattern, recursive=True))  # noqa: PTH207 (absolute patterns)
        files = set(filter(Path.is_file, matches))
        if not files:
            raise DataError(f"--input {pattern}: no file matches; check the path")
        found |= files
    return sorted(found)


def read_texts(
    paths: Sequence[Path], text_key: str = "text", source_key: str = "source"
) -> Iterator[tuple[str, str]]:
    """(source, text) of every row; a row that names no source counts for its file's stem."""
    for path in paths:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.isspace():
                    continue
                try:
                    row = orjson.loads(line)
                except orjson.JSONDecodeError as error:
                    raise DataError(f"{path}, line {number}: not JSON ({error})") from None
                text = row.get(text_key) if isinstance(row, dict) else None
                if not isinstance(text, str):
                    raise DataError(
                        f"{path}, line {number}: no string under {text_key!r}; name the key with "
                        "--text-key"
                    )
                yield str(row.get(source_key, path.stem)), text
