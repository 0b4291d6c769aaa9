"""Log-likelihood of given tokens under a trained model, on one rank.

Shape suffixes: B sequences, S positions, C tokens of a continuation, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moetron.moe.inference.generation import needed_mask
from moetron.moe.layers.language_model import LanguageModel


@dataclass(frozen=True)
class Score:
    """Score of a continuation."""

    log_likelihood: float
    """Sum of the log-probabilities of its tokens, in nats."""
    greedy: bool
    """Whether each token is the most likely one."""


def score(
    model: LanguageModel,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    batch_size: int,
    reads_prefix: bool = False,
) -> list[Score]:
    """Score continuations after their contexts.

    Sequences of similar length form a batch, padded at the end, where attention does not reach. A
    sequence longer than the model's loses its beginning.

    Args:
        model: on one rank; experts without capacity, which padding would use.
        pairs: (context, continuation), neither of them empty.
        batch_size: sequences per forward pass.
        reads_prefix: whether a context is a bidirectional prefix.
    """
    limit = model.max_sequence_length + 1
    rows = [
        ([*context, *continuation][-limit:], len(continuation)) for context, continuation in pairs
    ]
    longest_first = sorted(range(len(rows)), key=lambda number: -len(rows[number][0]))
    scores: dict[int, Score] = {}
    for start in range(0, len(rows), batch_size):
        numbers = longest_first[start : start + batch_size]
        batch = [rows[number] for number in numbers]
        scores.update(zip(numbers, _score_batch(model, batch, reads_prefix), strict=True))
    return [scores[number] for number in range(len(rows))]


def _score_batch(
    model: LanguageModel, batch: Sequence[tuple[list[int], int]], reads_prefix: bool
) -> list[Score]:
    """Score rows of (tokens, number of last tokens to score), the longest first."""
    width = len(batch[0][0]) - 1
    device = next(model.parameters()).device
    inputs_BS = torch.zeros(len(batch), width, dtype=torch.long, device=device)
    for row_S, (tokens, _) in zip(inputs_BS, batch, strict=True):
        row_S[: len(tokens) - 1] = torch.tensor(tokens[:-1])
    positions_BS = torch.arange(width, device=device).expand_as(inputs_BS)
    contexts = [max(len(tokens) - counted, 0) if reads_prefix else 0 for tokens, counted in batch]
    mask = needed_mask(model, torch.tensor(contexts, device=device), width)
    with torch.no_grad():
        logits_BSV = model(inputs_BS, positions_BS, mask)
    found = []
    for logits_SV, (tokens, counted) in zip(logits_BSV, batch, strict=True):
        counted = min(counted, len(tokens) - 1)
        last = len(tokens) - 1
        log_probs_CV = logits_SV[last - counted : last].float().log_softmax(-1)
        targets_C = torch.tensor(tokens[-counted:], device=device)
        own_C = log_probs_CV.gather(1, targets_C[:, None])
        greedy = bool((log_probs_CV.argmax(-1) == targets_C).all())
        found.append(Score(float(own_C.double().sum()), greedy))
    return found
