"""Synthetic samples: deterministic and learnable, so that the loss falls."""

import math
from typing import Any

import numpy as np

from moetron.data.stream.addresses import ENDLESS

ALPHABET = 256
"""Token ids in use, spread over the vocabulary: few, so that short runs see each one often."""
SUCCESSORS = np.array([0.4, 0.3, 0.2, 0.1])
"""Probabilities of a token's four successors."""
MOCK_EOD = 0
"""Token that ends a document, where documents are separated: one of the alphabet."""
NOISE = 0.1
"""Fraction of tokens drawn uniformly from the alphabet instead."""


class MockStream:
    """Random walk on a ring of at most 256 token ids, with four step sizes and some noise.

    Sample n depends only on (seed, vocab_size, n), and a longer ``seq_length`` only extends it: it
    is the raw output of numpy's Philox, keyed by the seed, with one counter per sample. Every rank
    of every layout sees the same samples.
    """

    def __init__(self, seed: int, vocab_size: int, seq_length: int) -> None:
        self.source_names, self.objective_names = ["mock"], ["causal"]
        self.bytes_per_token: list[float | None] = [None]
        self.seed = seed
        self.vocab_size = vocab_size
        self.seq_length = seq_length
        self._alphabet = min(ALPHABET, vocab_size)
        self._ids = np.arange(self._alphabet) * (vocab_size // self._alphabet)
        draws = np.random.Philox(key=seed, counter=0).random_raw(len(SUCCESSORS))
        self._steps = (draws % np.uint64(self._alphabet)).astype(np.int64)

    @property
    def entropy(self) -> float:
        """Return the entropy of the walk in nats per token, a lower bound of the loss."""
        chances = np.full(self._alphabet, NOISE / self._alphabet)
        np.add.at(chances, self._steps, (1 - NOISE) * SUCCESSORS)
        return -math.fsum(p * math.log(p) for p in chances.tolist())

    def __len__(self) -> int:
        """Return ``ENDLESS``."""
        return ENDLESS

    def __getitem__(self, n: int) -> dict[str, Any]:
        """Return sample ``n``: tokens, labels int64 [S], loss_mask float32 [S]; source 0."""
        if not 0 <= n < ENDLESS:
            raise IndexError(f"sample {n} of an endless stream")
        raw = np.random.Philox(key=self.seed, counter=(n + 1) << 128).random_raw(
            2 * (self.seq_length + 1)
        )
        chance = (raw[::2] >> np.uint64(11)) * 2.0**-53  # uniform in [0, 1)
        uniform = (raw[1::2] % np.uint64(self._alphabet)).astype(np.int64)
        branch = np.searchsorted((1 - NOISE) * np.cumsum(SUCCESSORS), chance, side="right")
        steps = np.where(branch < len(SUCCESSORS), np.append(self._steps, 0)[branch], uniform)
        steps[0] = uniform[0]
        tokens = self._ids[np.cumsum(steps) % self._alphabet]
        mask = np.ones(self.seq_length, np.float32)
        return {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "loss_mask": mask,
            "source": 0,
            "objective": 0,
            "prefix": 0,
            "filtered": 0,
        }

    def state(self) -> dict[str, Any]:
        """Return what identifies the stream (JSON)."""
        return {"mock": {"seed": self.seed, "vocab_size": self.vocab_size}}
