"""Rows of prompts in JSON Lines: text to continue, or a conversation to answer."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetron.common.errors import UserError
from moetron.data.chat.templates import Message, Undecidable

SHOWN = 20
"""Bad rows that an error names."""


@dataclass(frozen=True)
class PromptRow:
    """A prompt in tokens."""

    ids: list[int]
    given: Mapping[str, Any]
    """The row."""


def read_prompt_rows(
    path: Path,
    encode_text: Callable[[str], list[int]],
    encode_chat: Callable[[Sequence[Message]], list[int]] | None,
) -> list[PromptRow]:
    """Return the rows of a file, each with ``prompt`` or ``messages``; empty lines are left out.

    Args:
        path: UTF-8 JSON Lines.
        encode_text: returns the ids of a prompt.
        encode_chat: returns the ids of a conversation up to its next answer; None: no template.

    Raises:
        UserError: names all rows that cannot be used.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--input {path}: {error}") from None
    rows, problems = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(_row(line, encode_text, encode_chat))
        except (UserError, Undecidable) as error:
            problems.append(f"  - line {number}: {error}")
    if problems:
        more = [f"  - and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise UserError("\n".join([f"--input {path}: bad rows:", *problems[:SHOWN], *more]))
    if not rows:
        raise UserError(f"--input {path}: no rows; give lines of JSON with `prompt` or `messages`")
    return rows


def _row(
    line: str,
    encode_text: Callable[[str], list[int]],
    encode_chat: Callable[[Sequence[Message]], list[int]] | None,
) -> PromptRow:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON ({error})") from None
    if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
        raise UserError("must be an object with either `prompt` or `messages`")
    if "prompt" in row:
        if not isinstance(row["prompt"], str):
            raise UserError("`prompt` must be text")
        return PromptRow(encode_text(row["prompt"]), row)
    messages = row["messages"]
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise UserError("`messages` must be a list of objects with `role` and `content` as text")
    if messages[-1]["role"] == "assistant":
        raise UserError("the last message is an answer already")
    if encode_chat is None:
        raise UserError("`messages` need a chat template, and the run has none; give --template")
    return PromptRow(encode_chat(messages), row)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(key), str) for key in ("role", "content")
    )
