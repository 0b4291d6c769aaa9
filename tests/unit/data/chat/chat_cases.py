"""Small shards of chats, of bytes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moetron.data.chat.chat_rows import Kind
from moetron.data.chat.templates import OlmoeTemplate, Template
from moetron.data.chat.write_chats import ChatOptions, Outcome, read_json_rows, write_chats
from moetron.tokenizers.byte_level import ByteTokenizer

TOKENIZER = ByteTokenizer()


def chat(question: str, *answers: str) -> dict[str, Any]:
    """Return a row with the same question before each answer."""
    turns = [({"role": "user", "content": question}, answer) for answer in answers]
    return {
        "messages": [
            message
            for ask, text in turns
            for message in (ask, {"role": "assistant", "content": text})
        ]
    }


def prepare(
    folder: Path,
    rows: Sequence[Any],
    kind: Kind = "chats",
    length: int = 64,
    template: Template | None = None,
) -> Outcome:
    """Write ``rows`` to the shard ``folder / "chats"``."""
    file = folder / "rows.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    file.write_text("\n".join(lines), encoding="utf-8")
    options = ChatOptions(kind, "correct", length)
    template = template or OlmoeTemplate(TOKENIZER.end_text)
    return write_chats(read_json_rows([file]), template, TOKENIZER, options, folder / "chats")
