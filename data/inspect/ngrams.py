"""Count-based baselines: cross-entropies of a unigram and a bigram model.

The bigram model is modified Kneser-Ney, interpolated (Chen and Goodman 1999, section 3):

    p(w|h) = (c(hw) - D(c(hw))) / c(h) + lambda(h) p'(w),   lambda(h) = sum_w D(c(hw)) / c(h)

where c counts the training tokens, D is the discount of counts 1, 2 and 3 or more, and p' is built
from the number of distinct tokens that precede w, discounted the same way, mixed with the
uniform distribution. After an unseen h, p(w|h) = p'(w). The unigram model is p' made from plain
counts. Every id has a probability above 0, and they sum to 1.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

CHUNK_TOKENS = 1 << 24
DISCOUNT_OF_TINY_TEXT = 0.75
"""Used if the counts of counts are too small to estimate discounts."""


@dataclass(frozen=True)
class CrossEntropies:
    """Cross-entropies in nats per token."""

    unigram: float
    bigram: float
    tokens: int
    """Predicted tokens."""


class NgramModels:
    """Unigram and bigram probabilities fitted to token arrays.

    Args:
        streams: Token ids [T] of any integer dtype; pairs are counted within each stream, across
        document boundaries, as a model sees them.
        vocab_size: Exclusive upper bound of the ids (V).
    """

    def __init__(self, streams: Iterable[np.ndarray], vocab_size: int) -> None:
        self.vocab_size = vocab_size
        token_counts = np.zeros(vocab_size, np.int64)
        chunks: list[tuple[np.ndarray, np.ndarray]] = []
        for stream in streams:
            token_counts += np.bincount(stream, minlength=vocab_size)
            chunks += [np.unique(keys, return_counts=True) for keys in self._pair_keys(stream)]
        self.training_tokens = int(token_counts.sum())
        self._keys, counts = _merge(chunks)
        before, after = np.divmod(self._keys, vocab_size)
        discounts = _discounts(counts)[np.minimum(counts, 3)]
        self._history_counts = np.bincount(before, counts, vocab_size)
        self._kept = counts - discounts
        self._freed = np.bincount(before, discounts, vocab_size)
        self.unigram = _with_uniform(token_counts)
        self._lower = _with_uniform(np.bincount(after, minlength=vocab_size))

    def _pair_keys(self, stream: np.ndarray) -> Iterator[np.ndarray]:
        """Yield h * V + w of every pair (h, w) of neighbours, in chunks."""
        for start in range(0, len(stream) - 1, CHUNK_TOKENS):
            chunk = stream[start : start + CHUNK_TOKENS + 1].astype(np.int64)
            yield chunk[:-1] * self.vocab_size + chunk[1:]

    def bigram(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """Return p(after | before) elementwise: float64 in the shape of the ids."""
        lower = self._lower[after]
        if len(self._keys) == 0:
            return lower
        keys = before.astype(np.int64) * self.vocab_size + after
        place = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        kept = np.where(self._keys[place] == keys, self._kept[place], 0.0)
        seen = self._history_counts[before]
        mixed = (kept + self._freed[before] * lower) / np.maximum(seen, 1)
        return np.where(seen > 0, mixed, lower)


def cross_entropies(
    models: NgramModels, batches: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]
) -> CrossEntropies:
    """Return the mean negative log-probability of the unmasked labels.

    Args:
        models: The fitted models.
        batches: (tokens [N, S], labels [N, S], loss mask [N, S]) of a training stream; the bigram
        model predicts each label from the token at the same position.
    """
    unigram = bigram = 0.0
    tokens = 0
    for inputs, labels, mask in batches:
        counted = mask > 0
        before, after = inputs[counted], labels[counted]
        unigram -= float(np.log(models.unigram[after]).sum())
        bigram -= float(np.log(models.bigram(before, after)).sum())
        tokens += len(after)
    if tokens == 0:
        raise ValueError("no validation token to predict")
    return CrossEntropies(unigram / tokens, bigram / tokens, tokens)


def _merge(chunks: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Merge such pairs into (sorted distinct keys, their summed counts)."""
    if not chunks:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    keys, place = np.unique(np.concatenate([keys for keys, _ in chunks]), return_inverse=True)
    counts = np.bincount(place, np.concatenate([counts for _, counts in chunks]))
    return keys, counts.astype(np.int64)


def _discounts(counts: np.ndarray) -> np.ndarray:
    """Return [0, D1, D2, D3+] from the counts of counts (Chen and Goodman 1999, equation 26)."""
    n1, n2, n3, n4 = (int((counts == times).sum()) for times in (1, 2, 3, 4))
    if not (n1 and n2 and n3 and n4):
        return np.array([0.0] + [DISCOUNT_OF_TINY_TEXT] * 3)
    y = n1 / (n1 + 2 * n2)
    estimates = [0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
    # A zero discount leaves nothing for unseen pairs, a full one nothing for seen pairs.
    return np.clip(estimates, [0.0, 0.01, 0.01, 0.01], [0.0, 0.99, 1.99, 2.99])


def _with_uniform(counts: np.ndarray) -> np.ndarray:
    """Mix discounted counts [V] with the uniform distribution: probabilities [V], all above 0."""
    total = counts.sum()
    if total == 0:
        return np.full(len(counts), 1 / len(counts))
    discounts = _discounts(counts)[np.minimum(counts, 3)]
    return (counts - discounts + discounts.sum() / len(counts)) / total
