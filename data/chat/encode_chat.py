"""Token ids and loss mask of a conversation.

A label has loss if its token ends inside an answer: from the first character of the content to the
end-of-turn token. The mask belongs to labels and is never derived from ids, so that the same id may
be padding, the end of a document, and the trained end of a turn.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from moetron.data.chat.templates import Message, Rendered, Template, Undecidable
from moetron.tokenizers.interface import Tokenizer

MaskRule = Literal["correct", "as_released"]
"""``as_released``: also the token before each answer, its header's newline. OLMoE's released run
measured the mask without the begin token that it had put before the text, one token early."""


def encode_rendered(
    rendered: Rendered, tokenizer: Tokenizer, rule: MaskRule = "correct"
) -> tuple[np.ndarray, np.ndarray]:
    """Return ids, int32 [n], and the mask of labels, bool [n], of a conversation.

    Raises:
        Undecidable: an answer's first token begins in its header, or its last token runs on.
    """
    ids, starts, ends = _with_offsets(rendered.text, tokenizer)
    mask = np.zeros(len(ids), bool)
    for answer in rendered.answers:
        inside = (ends > answer.start) & (ends <= answer.end)
        places = np.flatnonzero(inside)
        if not len(places) or ends[places[-1]] != answer.end:
            raise Undecidable("a token of the end of an answer runs past it")
        if rendered.text[starts[places[0]] : answer.start].strip():
            raise Undecidable("a token of an answer begins in its header")
        mask |= inside
        if rule == "as_released":
            mask[max(places[0] - 1, 0)] = True
    return np.array(ids, np.int32), mask


def encode_question(
    messages: Sequence[Message], template: Template, tokenizer: Tokenizer
) -> list[int]:
    """Return the ids of a conversation up to where its next answer begins.

    Raises:
        Undecidable: a message spells a special token, or the template refuses the messages.
    """
    refuse_special([message["content"] for message in messages], tokenizer)
    return _with_offsets(template.prompt(messages), tokenizer)[0]


def _with_offsets(text: str, tokenizer: Tokenizer) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Return ids, first character and end of each token; end tokens spelled out are one token."""
    ids: list[int] = []
    starts: list[int] = []
    ends: list[int] = []
    place = 0
    for number, part in enumerate(text.split(tokenizer.end_text)):
        if number:
            ids.append(tokenizer.eod)
            starts.append(place)
            place += len(tokenizer.end_text)
            ends.append(place)
        part_ids, part_starts, part_ends = tokenizer.encode_with_offsets(part)
        ids += part_ids
        starts += [place + start for start in part_starts]
        ends += [place + end for end in part_ends]
        place += len(part)
    return ids, np.array(starts, np.int64), np.array(ends, np.int64)


def refuse_special(contents: Sequence[str], tokenizer: Tokenizer) -> None:
    """Raise Undecidable if a content spells a special token: it would end turns, or begin them."""
    special = (tokenizer.end_text, *tokenizer.special_texts)
    if any(token in content for content in contents for token in special):
        raise Undecidable("a message spells a special token")
