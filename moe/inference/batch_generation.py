"""Generation of several sequences in one batch.

Shape suffixes: B rows, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from moetron.moe.inference.growing_batch import GrowingBatch
from moetron.moe.inference.next_token import draw, penalize
from moetron.moe.inference.sampling import Sampling
from moetron.moe.layers.language_model import LanguageModel

LENGTH = "length"
"""Finish reason of a row that reached the largest number of new tokens."""


@dataclass(frozen=True)
class Request:
    """A sequence to continue."""

    ids: Sequence[int]
    """At least one token."""
    seed: int
    """Of its own draws, which no other row of a batch changes."""
    reads_prefix: bool = False
    """Whether the prompt is a bidirectional prefix."""


@dataclass
class Generated:
    """Tokens that follow a prompt."""

    tokens: list[int] = field(default_factory=list)
    """Including the one that ended the row."""
    log_probability: float = 0.0
    """Sum over the tokens under the model itself, without temperature and penalty, in nats."""
    finish_reason: str = LENGTH


class _Row:
    """A row's state while it grows."""

    def __init__(self, request: Request, vocab_size: int, sampling: Sampling) -> None:
        self.generated = Generated()
        self._sampling = sampling
        self._generator = torch.Generator().manual_seed(request.seed)
        self._seen_V = torch.zeros(vocab_size, dtype=torch.bool)
        self._seen_V[list(request.ids)] = True

    def choose(self, logits_V: torch.Tensor) -> int:
        """Draw and append the next token from float32 logits [vocabulary]."""
        chosen_V = logits_V
        if self._sampling.repetition_penalty != 1:
            chosen_V = penalize(logits_V, self._seen_V, self._sampling.repetition_penalty)
        token = draw(chosen_V, self._sampling, self._generator)
        self._seen_V[token] = True
        self.generated.tokens.append(token)
        self.generated.log_probability += float(logits_V.double().log_softmax(0)[token])
        return token


def generate_batch(
    model: LanguageModel,
    requests: Sequence[Request],
    vocab_size: int,
    sampling: Sampling,
    max_new_tokens: int,
    finish: Callable[[int, int], str | None],
    cached: bool = True,
) -> list[Generated]:
    """Continue each request until ``finish`` ends it; rows that are done leave the batch.

    Args:
        model: on one rank.
        requests: at least one; of one length unless `takes_padding`.
        vocab_size: before padding; padding ids are never chosen.
        sampling: sampling parameters but the seed, which is the request's.
        max_new_tokens: at least 1.
        finish: gets the number of a request and its newest token, in order; returns the reason why
            the row ends with this token, or None.
        cached: see `GrowingBatch`.
    """
    rows = [_Row(request, vocab_size, sampling) for request in requests]
    prefixes = [len(request.ids) if request.reads_prefix else 0 for request in requests]
    batch = GrowingBatch(model, len(rows), cached, prefixes)
    alive, new = list(range(len(rows))), [list(request.ids) for request in requests]
    for _ in range(max_new_tokens):
        logits_BV = batch.extend(new)[:, :vocab_size].float().cpu()
        new, kept = [], []
        for place, (number, logits_V) in enumerate(zip(alive, logits_BV, strict=True)):
            token = rows[number].choose(logits_V)
            reason = finish(number, token)
            if reason is not None:
                rows[number].generated.finish_reason = reason
                continue
            new.append([token])
            kept.append(place)
        if not kept:
            break
        if len(kept) < len(alive):
            batch.keep(kept)
            alive = [alive[place] for place in kept]
    return [row.generated for row in rows]
