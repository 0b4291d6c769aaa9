"""Samples of packed conversations by number.

An epoch's rows follow from lengths, seed and epoch alone: conversations in a random order, packed,
rows in a random order. Every epoch has the same number of rows (packing.py), so that a sample's
epoch follows from its number.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moetron.common.errors import UserError
from moetron.data.chat.chat_rows import Kind
from moetron.data.chat.chat_shard import UNTRAINED, WANTED, ChatShard
from moetron.data.chat.mismatch import Mismatched
from moetron.data.chat.packing import pack
from moetron.data.chat.run_template import TEMPLATE, template_record
from moetron.data.shards.shard import Shard
from moetron.data.stream.addresses import ENDLESS

Normalisation = Literal["token", "sample"]


def shuffled(count: int, seed: int, epoch: int, purpose: int) -> np.ndarray:
    """Return a permutation, int64 [count], the same on every machine and rank."""
    key = np.array([seed, epoch * 2 + purpose], np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(count), kind="stable")


def evenly(count: int) -> np.ndarray:
    """Return a permutation, int64 [count], whose first elements always lie evenly among all.

    Numbers in the order of the fractional parts of their multiples of the golden ratio: the three
    gap theorem (Swierczkowski 1958).
    """
    return np.argsort(np.arange(count) * ((5**0.5 - 1) / 2) % 1, kind="stable")


class ChatStream:
    """Conversations as samples of ``seq_length`` tokens that do not see each other.

    Args:
        shards: conversations; sources of the losses in the log.
        seq_length: tokens of a sample (S).
        pad: id of padding; its label has no loss, whatever the id means elsewhere.
        seed: of the order; None: each conversation once, rows in an order whose beginning is spread
            over all shards, since an evaluation may end early.
        packed: whether a sample holds as many conversations as fit, or one.
        normalisation: weight of a trained token: equal, or 1 / those of its conversation.
        kind: pairs stay together; labelled conversations come with mismatched ones (mismatch.py).

    Raises:
        UserError: a conversation, or a pair, is longer than a sample.
    """

    objective_names = ["chats"]

    def __init__(
        self,
        shards: Sequence[ChatShard],
        seq_length: int,
        pad: int,
        seed: int | None,
        packed: bool = True,
        normalisation: Normalisation = "token",
        kind: Kind = "chats",
    ) -> None:
        self.source_names = [Path(shard.prefix).name for shard in shards]
        self.bytes_per_token: list[float | None] = [None] * len(shards)
        self._shards, self._length, self._pad, self._seed = list(shards), seq_length, pad, seed
        self._packed, self._normalisation = packed, normalisation
        self._kind, group = kind, 2 if kind == "pairs" else 1
        self._places = [(s, n) for s, shard in enumerate(shards) for n in range(len(shard.lengths))]
        lengths = np.concatenate([np.asarray(shard.lengths) for shard in shards])
        if len(lengths) % group or not len(lengths):
            raise UserError(f"{self.source_names}: {len(lengths)} conversations, not in pairs")
        self.group = group
        self._sizes = lengths.reshape(-1, group).sum(1)
        self._refuse_long()
        self._mismatched: Mismatched | None = None
        if kind == "labelled":
            self._mismatched = Mismatched(self._shards, self._places, seq_length)
            self._sizes = np.maximum(self._sizes, self._mismatched.lengths)
        self.reference: np.ndarray | None = None
        """Log-probability of each conversation under the reference model, float32; of labelled
        ones, those of the mismatched follow."""
        self._epoch, self._rows = -1, list[list[int]]()
        self._prepare(0)
        self.rows_per_epoch = len(self._rows)

    def __len__(self) -> int:
        """Return the number of samples; a shuffled stream has no end."""
        return self.rows_per_epoch if self._seed is None else ENDLESS

    def _refuse_long(self) -> None:
        """Raise UserError for a conversation that no sample can hold."""
        if (longest := int(self._sizes.max())) > self._length:
            raise UserError(
                f"--seq-length {self._length}: {'a pair' if self.group > 1 else 'a conversation'} "
                f"has {longest} tokens; use at least that, or prepare again with a smaller "
                "--max-length"
            )

    def _pack(self, order: list[int]) -> list[list[int]]:
        """Return the conversations, or groups, of each row."""
        return pack(self._sizes.tolist(), self._length, order)

    def _prepare(self, epoch: int) -> None:
        """Compute the rows of an epoch, unless they are at hand."""
        if epoch == self._epoch:
            return
        count, seed = len(self._sizes), self._seed
        order = np.arange(count) if seed is None else shuffled(count, seed, epoch, 0)
        rows = (
            self._pack(order.tolist()) if self._packed else [[number] for number in order.tolist()]
        )
        size = len(rows)
        places = evenly(size) if seed is None else shuffled(size, seed, epoch, 1)
        self._epoch, self._rows = epoch, [rows[place] for place in places.tolist()]

    def conversations(self, n: int) -> list[int]:
        """Return the numbers of the conversations in sample ``n``, over all shards, in order."""
        if not 0 <= n < len(self):
            raise IndexError(f"sample {n} of a stream of {len(self)}")
        epoch, place = divmod(n, self.rows_per_epoch)
        self._prepare(epoch)
        return [self.group * u + i for u in self._rows[place] for i in range(self.group)]

    def __getitem__(self, n: int) -> dict[str, Any]:
        """Return sample ``n``.

        ``documents`` are its conversations, and the ``padding`` at its end. With the normalisation
        by sample also ``loss_weight``, and ``loss_count``, 1 for each conversation, float32 [S].
        """
        found = self.conversations(n)
        sample = self._sample(found)
        if self._mismatched is not None:
            total = len(self._places)
            sample["mismatched"] = self._sample([total + number for number in found])
            sample["wanted"] = np.zeros(self._length, np.int64)
            sample["wanted"][: len(found)] = [self._is_wanted(number) for number in found]
        return sample

    def _sample(self, found: list[int]) -> dict[str, Any]:
        """Return the sample of these conversations; from the number of all on, mismatched ones."""
        length = self._length
        row, mask = np.full(length + 1, self._pad, np.int64), np.zeros(length, np.float32)
        weight, count = np.zeros_like(mask), np.zeros_like(mask)
        documents, place = [], 0
        for number in found:
            ids, values = self._conversation(number)
            trained = values[1:] != UNTRAINED
            end = place + len(ids)
            row[place:end] = ids
            mask[place : end - 1] = trained  # the label of a token is the next one
            weight[place : end - 1] = trained / max(int(trained.sum()), 1)
            count[place + int(np.argmax(trained))] = 1
            documents.append(len(ids))
            place = end
        labels = row[1:].copy()
        labels[np.cumsum(documents) - 1] = self._pad
        rest = length - place
        sample = {
            "tokens": row[:-1],
            "labels": labels,
            "loss_mask": mask,
            "source": self._places[found[0] % len(self._places)][0],
            "objective": 0,
            "prefix": 0,
            "filtered": 0,
            "documents": np.array([*documents, rest] if rest else documents),
            "padding": rest,
        }
        if self._normalisation == "sample":
            sample |= {"loss_weight": weight, "loss_count": count}
        if self._kind != "chats":
            sample |= self._by_conversation(found, documents)
        return sample

    def _conversation(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and values of the mask, both [n]."""
        if self._mismatched is not None and number >= len(self._places):
            return self._mismatched[number - len(self._places)]
        shard, document = self._places[number]
        chosen = self._shards[shard]
        return chosen.tokens.document(document), chosen.mask.document(document)

    def _is_wanted(self, number: int) -> bool:
        _, values = self._conversation(number)
        return bool((values == WANTED).any())

    @property
    def conversation_count(self) -> int:
        """Return the number of conversations, mismatched ones included."""
        return len(self._places) * (1 if self._mismatched is None else 2)

    def _by_conversation(self, found: list[int], documents: list[int]) -> dict[str, Any]:
        """Return what losses on preferences need: arrays [S] by conversation or by position."""
        numbers, conversation = np.full(self._length, -1), np.zeros(self._length, np.int64)
        numbers[: len(found)] = found
        place = np.repeat(np.arange(len(found)), documents)
        conversation[: len(place)] = place
        known = np.zeros(self._length, np.float32)
        if self.reference is not None:
            known[: len(found)] = self.reference[found]
        return {
            "conversation": conversation,
            "numbers": numbers,
            "reference": known,
            "examples": len(found) // self.group,
        }

    @property
    def token_shards(self) -> list[Shard]:
        """Return the shards of tokens."""
        return [shard.tokens for shard in self._shards]

    def uses(self, samples: int) -> list[tuple[str, int, float]]:
        """Return name, tokens and epochs of each source in ``samples`` samples."""
        epochs = samples / self.rows_per_epoch
        sizes = [sum(shard.lengths) for shard in self._shards]
        return [
            (name, round(size * epochs), epochs)
            for name, size in zip(self.source_names, sizes, strict=True)
        ]

    def state(self) -> dict[str, Any]:
        """Return the identity (JSON): content, order and packing."""
        return {
            "sources": [
                {
                    "name": name,
                    "sha256": shard.sha256,
                    "chats": shard.description["mask"],
                    TEMPLATE: template_record(shard.description),
                }
                for name, shard in zip(self.source_names, self._shards, strict=True)
            ],
            "seed": self._seed,
            "seq_length": self._length,
            "packed": self._packed,
        }


def open_chats(
    prefixes: Sequence[str],
    seq_length: int,
    fingerprint: str,
    pad: int,
    seed: int | None,
    packed: bool = True,
    normalisation: Normalisation = "token",
    kind: Kind = "chats",
) -> ChatStream:
    """Open shards of chats in place of a data path; see `ChatStream`.

    Shards of every ``kind`` but text_to_text serve as chats.

    Raises:
        UserError: a shard cannot be used, or is of another kind.
    """
    shards = [ChatShard(prefix, fingerprint) for prefix in prefixes]
    for shard in shards:
        found = shard.description["kind"]
        if kind not in ("chats", found):
            raise UserError(f"{shard.prefix}: not of {kind} rows; prepare it with --kind {kind}")
        if found == "text_to_text":
            raise UserError(f"{shard.prefix}: inputs and targets, which need --encoder-num-layers")
    return ChatStream(shards, seq_length, pad, seed, packed, normalisation, kind)
