"""Samples of an encoder-decoder from shards of inputs and targets, by number.

The encoder's part of a sample holds the inputs of one or several examples, the decoder's part their
targets, shifted by a start token; examples do not see each other in either stack, nor across
(moe/encoder_decoder/segments.py).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from moetron.common.errors import UserError
from moetron.data.chat.chat_shard import UNTRAINED, ChatShard
from moetron.data.chat.chat_stream import ChatStream, Normalisation
from moetron.data.chat.packing import pack_stacks
from moetron.data.chat.run_template import TEMPLATE
from moetron.data.shards.shard import Shard

KIND = "text_to_text"


class TextToTextStream(ChatStream):
    """Examples packed into both stacks at once, in the order of a `ChatStream`.

    Args:
        shards: of inputs and targets.
        lengths: tokens of a sample in the encoder and in the decoder.
        pad: id of padding, and the first id of the decoder, as in T5.
        seed: of the order; None: each example once, the first ones of all shards.
        packed: whether a sample holds as many examples as fit, or one.
        normalisation: weight of a trained token: equal, or 1 / those of its example.

    Raises:
        UserError: inputs or targets are longer than their part of a sample.
    """

    objective_names = [KIND]

    def __init__(
        self,
        shards: Sequence[ChatShard],
        lengths: tuple[int, int],
        pad: int,
        seed: int | None,
        packed: bool = True,
        normalisation: Normalisation = "token",
    ) -> None:
        targets = np.concatenate([_target_lengths(shard.mask) for shard in shards])
        whole = np.concatenate([np.asarray(shard.lengths) for shard in shards])
        self._parts = np.stack([whole - targets, targets], axis=1)
        self._room = lengths
        super().__init__(shards, sum(lengths), pad, seed, packed, normalisation)

    def _refuse_long(self) -> None:
        longest, flags = self._parts.max(0).tolist(), ("--max-length", "--max-target-length")
        parts = zip(("encoder", "decoder"), longest, self._room, flags, strict=True)
        problems = [
            f"{tokens} tokens of an example do not fit into the {length} of the {stack}: change "
            f"--encoder-seq-length or --seq-length, or prepare again with a smaller {flag}"
            for stack, tokens, length, flag in parts
            if tokens > length
        ]
        if problems:
            raise UserError("\n".join(problems))

    def _pack(self, order: list[int]) -> list[list[int]]:
        return pack_stacks(self._parts, self._room, order)

    def __getitem__(self, n: int) -> dict[str, Any]:
        """Return sample ``n``: as `ChatStream`, with ``segments`` in place of ``documents``."""
        found, length = self.conversations(n), self._length
        tokens, labels = (np.full(length, self._pad, np.int64) for _ in range(2))
        mask, weight, count = (np.zeros(length, np.float32) for _ in range(3))
        segments = np.zeros(length, np.int64)
        first, start = 0, self._room[0]  # of the next inputs and targets
        for example, number in enumerate(found, 1):
            shard, document = self._places[number]
            ids, split = self._shards[shard].tokens.document(document), self._parts[number, 0]
            end, stop = first + split, start + len(ids) - split
            tokens[first:end] = ids[:split]
            tokens[start + 1 : stop] = ids[split:-1]  # after the start token
            labels[start:stop] = ids[split:]
            segments[first:end] = segments[start:stop] = example
            mask[start:stop] = 1.0
            weight[start:stop] = 1 / (stop - start)
            count[start] = 1
            first, start = end, stop
        sample = {
            "tokens": tokens,
            "labels": labels,
            "loss_mask": mask,
            "source": self._places[found[0]][0],
            "objective": 0,
            "prefix": 0,
            "filtered": 0,
            "segments": segments,
        }
        if self._normalisation == "sample":
            sample |= {"loss_weight": weight, "loss_count": count}
        return sample

    def state(self) -> dict[str, Any]:
        """Return the identity (JSON), with the encoder's part; there is no template."""
        found = super().state()
        sources = [{k: v for k, v in each.items() if k != TEMPLATE} for each in found["sources"]]
        return {**found, "sources": sources, "encoder_length": self._room[0]}


def _target_lengths(mask: Shard) -> np.ndarray:
    """Return the trained tokens of each document: those of its targets."""
    lengths = mask.document_lengths.astype(np.int64)
    return np.add.reduceat(mask.tokens != UNTRAINED, np.cumsum(lengths) - lengths, dtype=np.int64)


def open_text_to_text(
    prefixes: Sequence[str],
    lengths: tuple[int, int],
    fingerprint: str,
    pad: int,
    seed: int | None,
    packed: bool = True,
    normalisation: Normalisation = "token",
) -> TextToTextStream:
    """Open shards of inputs and targets in place of a data path; see `TextToTextStream`.

    Raises:
        UserError: a shard cannot be used, or is of another kind.
    """
    shards = [ChatShard(prefix, fingerprint) for prefix in prefixes]
    for shard in shards:
        if shard.description["kind"] != KIND:
            raise UserError(
                f"{shard.prefix}: no inputs and targets, which an encoder-decoder needs; prepare "
                f"it with --kind {KIND}"
            )
    return TextToTextStream(shards, lengths, pad, seed, packed, normalisation)
