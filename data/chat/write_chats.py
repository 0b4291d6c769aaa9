"""Rows of chats to shards: render, find the answers, encode, drop and count what cannot be used."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moetron.common.errors import UserError
from moetron.data.chat.chat_rows import BadRow, Example, Kind, examples
from moetron.data.chat.chat_shard import ChatShardWriter
from moetron.data.chat.encode_chat import MaskRule, encode_rendered, refuse_special
from moetron.data.chat.templates import Template, Undecidable
from moetron.data.encoding.encode import is_held_out
from moetron.data.readers.rows import content
from moetron.data.shards.manifest import Manifest
from moetron.tokenizers.interface import Tokenizer

TRUNCATED = "truncated"
NO_ANSWER = "no token of an answer"


@dataclass(frozen=True)
class ChatOptions:
    """What to prepare, and how."""

    kind: Kind
    rule: MaskRule
    max_length: int
    """Tokens after which a conversation is cut."""
    holdout_fraction: float = 0.0


@dataclass(frozen=True)
class Encoded:
    """A conversation in tokens."""

    ids: np.ndarray
    mask: np.ndarray
    wanted: bool
    text: str


@dataclass(frozen=True)
class Outcome:
    """Manifests by prefix, counts of rows, and the first conversation."""

    manifests: dict[str, Manifest]
    counts: Counter[str]
    first: Encoded | None


def read_json_rows(files: Sequence[Path]) -> Iterator[Any]:
    """Yield the rows of JSONL files (.gz, .zst); None for a line that is not JSON."""
    for file in files:
        with content(file) as (_, stream):
            for line in stream:
                if line.strip():
                    try:
                        yield json.loads(line)
                    except (ValueError, RecursionError):
                        yield None


def encode_example(
    example: Example, template: Template, tokenizer: Tokenizer, options: ChatOptions
) -> Encoded:
    """Return one conversation; `Undecidable` if it has no sure mask."""
    refuse_special([m["content"] for m in example.messages], tokenizer)
    rendered = template.render(example.messages)
    ids, mask = encode_rendered(rendered, tokenizer, options.rule)
    return Encoded(ids, mask, example.wanted, rendered.text)


def _usable(
    row: Any,
    template: Template,
    tokenizer: Tokenizer,
    options: ChatOptions,
    counts: Counter[str],
) -> list[Encoded]:
    """Return the conversations of a row, cut to length; none if one cannot be used."""
    if not isinstance(row, dict):
        raise BadRow("not a JSON object")
    found = []
    for example in examples(row, options.kind):
        encoded = encode_example(example, template, tokenizer, options)
        if len(encoded.ids) > options.max_length:
            counts[TRUNCATED] += 1
        ids, mask = encoded.ids[: options.max_length], encoded.mask[: options.max_length]
        if not mask[1:].any():  # the first token is nobody's label
            raise Undecidable(NO_ANSWER)
        found.append(Encoded(ids, mask, encoded.wanted, encoded.text))
    return found


def write_chats(
    rows: Iterator[Any],
    template: Template,
    tokenizer: Tokenizer,
    options: ChatOptions,
    prefix: Path,
    holdout: Path | None = None,
) -> Outcome:
    """Write the conversations of ``rows``, a fraction of them to ``holdout``.

    Raises:
        UserError: no row can be used; the message counts the reasons.
    """
    counts: Counter[str] = Counter()
    first: Encoded | None = None
    with ExitStack() as stack:
        named = {str(p): p for p in (prefix, holdout) if p is not None}
        writers = {n: stack.enter_context(ChatShardWriter(p, tokenizer)) for n, p in named.items()}
        for row in rows:
            counts["rows"] += 1
            try:
                found = _usable(row, template, tokenizer, options, counts)
            except (BadRow, Undecidable) as error:
                counts[str(error)] += 1
                continue
            first = first or found[0]
            out = is_held_out(found[0].text, options.holdout_fraction)
            writer = writers[str(holdout if out and holdout is not None else prefix)]
            for each in found:
                writer.add(each.ids, each.mask, each.wanted, len(each.text.encode()))
            counts["used"] += 1
        if first is None:
            raise UserError(f"no row can be used: {dict(counts) or 'there is none'}")
        description = {
            "kind": options.kind,
            "template": template.name,
            "source": template.source(),
            "end_of_turn": template.end_of_turn,
            "mask": options.rule,
            "max_length": options.max_length,
        }
        manifests = {n: w.finish(description, dict(counts)) for n, w in writers.items()}
    return Outcome(manifests, counts, first)
