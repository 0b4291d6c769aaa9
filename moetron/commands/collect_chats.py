"""Make small chats and preferences from documentation on this machine: a demonstration.

    python tools/collect_chats.py --output DIR

Writes DIR/chats.jsonl and DIR/pairs.jsonl for tools/prepare_chats.py: questions about functions of
Python's standard library, answered by the first sentence of their documentation, and preferences of
that sentence over the same words in alphabetical order. They show that fine-tuning works, and
nothing about assistants. Exit codes: 0 done, 2 user error.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moetron.common.errors import UserError
from moetron.common.files import atomic_file, require_writable
from moetron.data.corpora import questions
from moetron.moe.config.schema.paths import ToolParser


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    with atomic_file(path) as file:
        file.write("".join(lines).encode())
    return len(lines)


def main() -> int:
    """Write both files; return the exit code."""
    parser = ToolParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where to write")
    folder: Path = parser.parse_args().output
    try:
        require_writable(folder / "chats")
        found = questions.collected()
        for name, rows in (("chats", questions.chats(found)), ("pairs", questions.pairs(found))):
            path = folder / f"{name}.jsonl"
            print(f"{path}: {_write(path, rows)} rows")
    except OSError as error:
        raise UserError(f"--output {folder}: {error}") from error
    return 0
