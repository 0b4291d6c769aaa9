"""Rows of text-to-text tasks, as T5 has them: inputs that an encoder reads, targets with loss.

A document of a shard is a row's inputs and an end, then its targets and an end; its mask is
untrained over the first part and trained over the second, which so also tells where it begins.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from moetron.data.chat.chat_rows import BadRow
from moetron.data.chat.encode_chat import refuse_special
from moetron.data.chat.templates import Undecidable
from moetron.tokenizers.interface import Tokenizer

NO_TARGET = "no token of a target"
_NAMES = (("inputs", "targets"), ("prompt", "completion"))
_ROLES = ["user", "assistant"]


def texts(row: Mapping[str, Any]) -> tuple[str, str]:
    """Return a row's inputs and targets.

    ``inputs`` and ``targets``, ``prompt`` and ``completion``, or ``messages`` that are a question
    and its answer.

    Raises:
        BadRow: the row has none of them as text.
    """
    for names in _NAMES:
        found = [row.get(name) for name in names]
        if all(isinstance(text, str) for text in found):
            return str(found[0]), str(found[1])
    messages = row.get("messages")
    if not isinstance(messages, list) or not all(isinstance(m, Mapping) for m in messages):
        raise BadRow("no inputs and targets as text")
    contents = [m.get("content") for m in messages]
    if [m.get("role") for m in messages] != _ROLES or not all(isinstance(c, str) for c in contents):
        raise BadRow("messages other than a question and its answer")
    return contents[0], contents[1]


def encode_texts(
    inputs: str, targets: str, tokenizer: Tokenizer, max_inputs: int, max_targets: int
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Return ids, int32 [n], the mask of trained ids, bool [n], and whether anything was cut.

    A text that is too long is cut before its end, which both parts always have (seqio's
    ``append_eos_after_trim``).

    Args:
        inputs: text for the encoder.
        targets: text for the decoder.
        tokenizer: of the model.
        max_inputs: tokens of the inputs with their end.
        max_targets: tokens of the targets with their end.

    Raises:
        Undecidable: a text spells a special token, or there is no target.
    """
    refuse_special([inputs, targets], tokenizer)
    whole = [tokenizer.encode(text) for text in (inputs, targets)]
    if not whole[1]:
        raise Undecidable(NO_TARGET)
    read, answered = (
        [*ids[: limit - 1], tokenizer.eod]
        for ids, limit in zip(whole, (max_inputs, max_targets), strict=True)
    )
    mask = np.zeros(len(read) + len(answered), bool)
    mask[len(read) :] = True
    cut = len(whole[0]) >= max_inputs or len(whole[1]) >= max_targets
    return np.array([*read, *answered], np.int32), mask, cut
