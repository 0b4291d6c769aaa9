"""Generation prompts in the format of the model's training objective."""

import re
from collections.abc import Sequence
from typing import Literal

from moetron.common.errors import UserError
from moetron.tokenizers.interface import Tokenizer

Mode = Literal["causal", "s2s", "nlu", "nlg"]
"""Plain text to continue, or UL2's modes: a prefix to complete (s2s), or holes to fill, few and
short (nlu) or many and long (nlg)."""
HOLE = re.compile(r"<extra_id_(\d+)>")
"""Marker of a hole in a UL2 prompt."""


def prompt_ids(text: str, mode: Mode, tokenizer: Tokenizer, has_encoder: bool = False) -> list[int]:
    """Return the tokens of a prompt; UL2's start with padding and finish with the end id.

    An encoder reads the prompt and an end; holes are those of its span corruption.

    Raises:
        UserError: holes in s2s mode, none in nlu and nlg, out of order, more than the tokenizer has
        sentinels, or a mode of an encoder-decoder.
    """
    if has_encoder and mode != "causal":
        raise UserError(f"mode {mode}: an encoder-decoder has no modes; leave it out")
    if mode == "causal" and not (has_encoder and HOLE.search(text)):
        ids = tokenizer.encode(text)
        return [*ids, tokenizer.eod] if has_encoder else ids or [tokenizer.eod]
    holes = [int(number) for number in HOLE.findall(text)]
    if holes != list(range(len(holes))) or bool(holes) != (mode != "s2s"):
        raise UserError(
            f"mode {mode}: the prompt must have "
            + ("no holes" if mode == "s2s" else "<extra_id_0>, <extra_id_1>, ... in this order")
        )
    if len(holes) > len(tokenizer.sentinels) or not tokenizer.sentinels:
        raise UserError(
            f"mode {mode}: the tokenizer {tokenizer.name} has {len(tokenizer.sentinels)} sentinels"
        )
    ids = [] if has_encoder else [tokenizer.pad, *tokenizer.encode(f"[{mode.upper()}] ")]
    for number, part in enumerate(HOLE.split(text)[::2]):
        ids += ([tokenizer.sentinels[number - 1]] if number else []) + tokenizer.encode(part)
    return [*ids, tokenizer.eod]


def filled(text: str, new: Sequence[int], tokenizer: Tokenizer) -> str:
    """Fill a prompt's holes with a model's answer: sentinel, span, sentinel, span, ...

    Holes without an answer stay.
    """
    starts = {token: number for number, token in enumerate(tokenizer.sentinels)}
    spans: dict[int, list[int]] = {}
    current: list[int] = []
    for token in new:
        if token in starts:
            current = spans.setdefault(starts[token], [])
        else:
            current.append(token)
    return HOLE.sub(
        lambda hole: tokenizer.decode(spans[int(hole[1])]) if int(hole[1]) in spans else hole[0],
        text,
    )
