"""Prompts for generation in the form that a model was trained on."""

import re
from collections.abc import Sequence
from typing import Literal

from moetron.common.errors import UserError
from moetron.tokenizers.interface import Tokenizer

Mode = Literal["causal", "s2s", "nlu", "nlg"]
"""Plain text to go on with, or UL2's: a prefix to complete, or holes to fill, few and short
(nlu) or many and long (nlg)."""
HOLE = re.compile(r"<extra_id_(\d+)>")
"""How a prompt marks what a UL2 model shall fill in."""


def prompt_ids(text: str, mode: Mode, tokenizer: Tokenizer) -> list[int]:
    """Tokens of a prompt; UL2's begin with the padding, end with the end (see ``ul2.UL2``).

    Raises:
        UserError: holes in another mode or none in nlu and nlg, out of order, or more than the
            tokenizer has sentinels.
    """
    if mode == "causal":
        return tokenizer.encode(text) or [tokenizer.eod]
    holes = [int(number) for number in HOLE.findall(text)]
    if holes != list(range(len(holes))) or bool(holes) != (mode != "s2s"):
        raise UserError(
            f"mode {mode}: the prompt must mark "
            + ("nothing" if mode == "s2s" else "<extra_id_0>, <extra_id_1>, ... in this order")
        )
    if len(holes) > len(tokenizer.sentinels) or not tokenizer.sentinels:
        raise UserError(
            f"mode {mode}: the tokenizer {tokenizer.name} has {len(tokenizer.sentinels)} sentinels"
        )
    ids = [tokenizer.pad, *tokenizer.encode(f"[{mode.upper()}] ")]
    for number, part in enumerate(HOLE.split(text)[::2]):
        ids += ([tokenizer.sentinels[number - 1]] if number else []) + tokenizer.encode(part)
    return [*ids, tokenizer.eod]


def filled(text: str, new: Sequence[int], tokenizer: Tokenizer) -> str:
    """A prompt with holes, filled with what a model answered: sentinel, span, sentinel, span, ...

    What has no answer stays a hole.
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
