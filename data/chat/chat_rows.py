"""Rows of chats: HuggingFace's common forms, as conversations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from moetron.data.chat.templates import Message

Kind = Literal["chats", "pairs", "labelled"]
"""Conversations; a chosen and a rejected one for each prompt; or single ones, wanted or not."""


class BadRow(Exception):
    """The row has another form; the text says which."""


@dataclass(frozen=True)
class Example:
    """A conversation."""

    messages: Sequence[Message]
    wanted: bool = True
    """False: rejected or undesirable."""


def examples(row: Mapping[str, Any], kind: Kind) -> list[Example]:
    """Return the conversations of a row.

    chats: ``messages``, or ``prompt`` and ``completion``. pairs: ``chosen`` and ``rejected``,
    conversations or answers to ``prompt``. labelled: as chats, with a boolean ``label``; or as
    pairs, of which each is an example.

    Raises:
        BadRow: the row lacks them.
    """
    if kind == "pairs" or (kind == "labelled" and "label" not in row and "chosen" in row):
        both = [_conversation(row, row.get(name), name) for name in ("chosen", "rejected")]
        return [Example(both[0]), Example(both[1], wanted=False)]
    messages = (
        _messages(row["messages"], "messages")
        if "messages" in row
        else _conversation(row, row.get("completion"), "completion")
    )
    if kind == "chats":
        return [Example(messages)]
    if not isinstance(row.get("label"), bool):
        raise BadRow("no boolean label")
    return [Example(messages, row["label"])]


def _conversation(row: Mapping[str, Any], answer: Any, name: str) -> list[Message]:
    """Return an answer, text or messages, after the row's prompt, text or messages or absent."""
    prompt = row.get("prompt")
    if isinstance(answer, str):
        if prompt is None:
            raise BadRow("no prompt")
        answer = [{"role": "assistant", "content": answer}]
    answered = _messages(answer, name)
    if prompt is None or answered[0]["role"] != "assistant":
        return answered  # the whole conversation, as in UltraFeedback, which has a prompt too
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    return [*_messages(prompt, "prompt"), *answered]


def _messages(value: Any, name: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise BadRow(f"no {name}")
    for message in value:
        if not isinstance(message, Mapping) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise BadRow(f"{name}: a message without role and content as text")
    return value
