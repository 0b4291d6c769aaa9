"""Make small chats and preferences from documentation on this machine: a demonstration.

    python tools/collect_chats.py --output DIR

Writes DIR/chats.jsonl and DIR/pairs.jsonl for tools/prepare_chats.py, and a tenth of the questions
to DIR/chats.valid.jsonl and DIR/pairs.valid.jsonl, the same in both. Questions are about functions
of Python's standard library, answered by the first sentence of their documentation, and about
commands, answered by the line of their manual page. The preferred answer also says where the
documentation is. They show that fine-tuning works, and nothing about assistants. Exit codes: 0
done, 2 user error.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moetron.common.errors import UserError
from moetron.common.files import atomic_file, require_writable
from moetron.data.corpora import questions
from moetron.data.encoding.encode import is_held_out
from moetron.moe.config.schema.paths import ToolParser

HELD_OUT = 0.1


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    with atomic_file(path) as file:
        file.write("".join(lines).encode())
    print(f"{path}: {len(lines)} rows")


def main() -> int:
    """Write the files; return the exit code."""
    parser = ToolParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where to write")
    folder: Path = parser.parse_args().output
    try:
        require_writable(folder / "chats")
        for end, entries in zip(("", ".valid"), _parts(), strict=True):
            _write(folder / f"chats{end}.jsonl", questions.chats(entries))
            _write(folder / f"pairs{end}.jsonl", questions.pairs(entries))
    except OSError as error:
        raise UserError(f"--output {folder}: {error}") from error
    return 0


def _parts() -> tuple[list[questions.Entry], list[questions.Entry]]:
    """Return what is for training and what is held out, by answer."""
    found = questions.collected()
    held_out = [is_held_out(entry.sentence, HELD_OUT) for entry in found]
    return (
        [entry for entry, out in zip(found, held_out, strict=True) if not out],
        [entry for entry, out in zip(found, held_out, strict=True) if out],
    )
