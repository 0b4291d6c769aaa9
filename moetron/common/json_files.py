"""Reading of JSON files that may be damaged or hostile."""

import json
from pathlib import Path
from typing import Any

from moetron.common.errors import UserError
from moetron.common.files import read_regular


def parse_object(text: str, name: object) -> dict[str, Any]:
    """Return the object in a JSON text.

    Raises:
        UserError: not JSON, not an object, numbers of too many digits, or nested too deeply; the
            message begins with ``name``.
    """
    try:
        content = json.loads(text)
    except ValueError as error:  # includes integers beyond Python's limit of digits
        raise UserError(f"{name}: damaged: not JSON ({error})") from None
    except RecursionError:
        raise UserError(f"{name}: damaged: nested too deeply") from None
    if not isinstance(content, dict):
        raise UserError(f"{name}: damaged: not a JSON object")
    return content


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a UTF-8 JSON file.

    Raises:
        UserError: see `parse_object`; or the file cannot be read.
    """
    return parse_object(_text(path), path)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a UTF-8 JSON Lines file.

    Raises:
        UserError: see `parse_object`, with the line; or the file cannot be read.
    """
    lines = _text(path).split("\n")
    return [parse_object(line, f"{path}:{n}") for n, line in enumerate(lines, 1) if line]


def _text(path: Path) -> str:
    try:
        return read_regular(path).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
