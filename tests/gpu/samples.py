"""Samples of the compared cases, of equal tokens on every device."""

import atexit
import contextlib
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from moetron.data.chat.chat_rows import Kind
from moetron.data.chat.chat_stream import ChatStream, open_chats
from tests.parallel.support.parity_ranks import MaskedStream, PackedStream
from tests.unit.data.chat.chat_cases import TOKENIZER, chat, prepare

SEED = 1
CHATS: tuple[Kind, ...] = ("chats", "pairs", "labelled")
LONGEST_TOKENS = 60
"""Of a conversation: pairs fit into the shortest sequences of the recipes."""

_FOLDERS = contextlib.ExitStack()
atexit.register(_FOLDERS.close)


class _Prefixes(MaskedStream):
    """Mock samples; their bidirectional prefixes reach up to the middle."""

    def __getitem__(self, n: int) -> dict[str, Any]:
        sample = super().__getitem__(n)
        sample["prefix"] = n % (self.seq_length // 2)
        sample["loss_mask"][: sample["prefix"]] = 0
        return sample


def _rows(kind: Kind) -> list[dict[str, Any]]:
    """Return chats, pairs or labelled answers of several lengths."""
    prompts = ["ab" * (n % 5) + "c" * (n % 3) for n in range(32)]
    answers = [("yes" * (1 + n % 4), "no" * (1 + n % 3)) for n in range(32)]
    both = list(zip(prompts, answers, strict=True))
    if kind == "pairs":
        return [{"prompt": p, "chosen": yes, "rejected": no} for p, (yes, no) in both]
    if kind == "labelled":
        return [
            {"prompt": p, "completion": answer[n % 2], "label": n % 2 == 0}
            for n, (p, answer) in enumerate(both)
        ]
    return [chat(p + "?", yes) for p, (yes, _) in both]


@cache
def chat_prefix(kind: Kind) -> str:
    """Return the path of conversations of bytes, written once for this process."""
    folder = Path(_FOLDERS.enter_context(tempfile.TemporaryDirectory()))
    prepare(folder, _rows(kind), kind=kind, length=LONGEST_TOKENS)
    return str(folder / "chats")


def _chats(kind: Kind, vocab_size: int, seq_length: int) -> ChatStream:
    """Return packed conversations, with any values of a reference."""
    assert vocab_size == TOKENIZER.vocab_size
    tokens = TOKENIZER.fingerprint, TOKENIZER.pad
    stream = open_chats([chat_prefix(kind)], seq_length, *tokens, SEED, kind=kind)
    if kind != "chats":
        stream.reference = 5 * np.cos(np.arange(stream.conversation_count), dtype=np.float32)
    if kind == "labelled":  # near the answers' own, so that no sigmoid is flat
        half = stream.conversation_count // 2
        stream.reference -= np.repeat(np.float32([45, 60]), half)
    return stream


STREAMS: dict[str, Callable[[int, int], Any]] = {
    "mock": partial(MaskedStream, SEED),
    "prefixes": partial(_Prefixes, SEED),
    "packed": partial(PackedStream, SEED),
    **{kind: partial(_chats, kind) for kind in CHATS},
}
"""Name -> stream of a vocabulary size and a length of sequences."""
