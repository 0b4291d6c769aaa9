"""Mismatched examples, whose answers belong to other prompts: KTO's baseline is taken from them.

Prompt of an example: its tokens before the first trained one; answer: the rest.
"""

from collections.abc import Sequence
from hashlib import sha256

import numpy as np

from moetron.common.errors import UserError
from moetron.data.chat.chat_shard import UNTRAINED, ChatShard

Place = tuple[int, int]
"""Number of a shard, and of a conversation in it."""


def shifted_answers(prompts: Sequence[bytes]) -> np.ndarray:
    """Return the example whose answer each example takes: a permutation, int64 [N].

    Examples with the same prompt are put side by side, prompts in the order of their hashes. An
    answer moves by the size of the largest such group, and so always to another prompt.

    Args:
        prompts: hash of each example's prompt.

    Raises:
        UserError: more than half of the examples have the same prompt.
    """
    groups: dict[bytes, list[int]] = {}
    for number, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(number)
    size = max(map(len, groups.values()))
    if 2 * size > len(prompts):
        raise UserError(
            f"{size} of {len(prompts)} examples have the same prompt: KTO compares answers with "
            "those to other prompts; no prompt may have more than half of the examples"
        )
    line = np.array([number for prompt in sorted(groups) for number in groups[prompt]])
    found = np.empty_like(line)
    found[line] = np.roll(line, -size)
    return found


class Mismatched:
    """Mismatched examples of shards, the same in every epoch.

    Args:
        shards: of single conversations.
        places: of all of them.
        room: tokens after which a mismatched example is cut.
    """

    def __init__(self, shards: Sequence[ChatShard], places: Sequence[Place], room: int) -> None:
        self._shards, self._places = shards, places
        starts, sizes, prompts = [], [], []
        for shard, document in places:
            mask = shards[shard].mask.document(document)
            start = int(np.argmax(mask[1:] != UNTRAINED)) + 1  # nobody predicts the first token
            ids = shards[shard].tokens.document(document)
            prompts.append(sha256(ids[:start].tobytes()).digest())
            starts.append(start)
            sizes.append(len(ids))
        self._starts, self._partners = np.array(starts), shifted_answers(prompts)
        answers = np.array(sizes) - self._starts
        self.lengths = np.minimum(self._starts + answers[self._partners], room)
        """Tokens of each mismatched example: int64 [N]."""

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and values of the mask, both [n], of a prompt with another's answer."""
        other, length = int(self._partners[number]), int(self.lengths[number])
        start, answer = int(self._starts[number]), int(self._starts[other])
        (shard, document), (other_shard, other_document) = self._places[number], self._places[other]
        ids = np.concatenate(
            [
                self._shards[shard].tokens.document(document)[:start],
                self._shards[other_shard].tokens.document(other_document)[answer:],
            ]
        )
        prompt_mask = np.full(start, UNTRAINED)
        mask = self._shards[other_shard].mask.document(other_document)[answer:]
        return ids[:length], np.concatenate([prompt_mask, mask])[:length]
