"""Specialisation: how the routing of tokens depends on a class they belong to.

A class is anything that a token has one of: the domain, language or task of its text, its position,
its id, the id that the model predicts or the one that really follows.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from moetron.common.errors import UserError
from moetron.moe.analysis.routing_trace import Routed


class ClassCounts:
    """For every class and expert, how many tokens of the class have the expert among their best.

    Memory: 4 L C E bytes. ``counts`` int32 [L, C, E]; ``tokens`` int64 [C].
    """

    def __init__(self, layers: int, classes: int, experts: int, top: int | None = None) -> None:
        self.counts = np.zeros((layers, classes, experts), dtype=np.int32)
        self.tokens = np.zeros(classes, dtype=np.int64)
        self._top = top

    def add(self, classes_T: np.ndarray, routed: Routed) -> None:
        """Count tokens of classes int [T]."""
        self.tokens += np.bincount(classes_T, minlength=len(self.tokens))
        ranked_LTK = routed.ranked_LTK[:, :, : self._top].astype(np.int64)
        _, classes, experts = self.counts.shape
        cells = classes_T[:, None] * experts + ranked_LTK
        for layer, cells_TK in enumerate(cells):
            flat = cells_TK[ranked_LTK[layer] >= 0]
            cell, count = np.unique(flat, return_counts=True)
            self.counts[layer].reshape(classes * experts)[cell] += count.astype(np.int32)

    def shares(self) -> np.ndarray:
        """N(Ei, c) / N(c): share of a class's tokens that visit an expert, float64 [L, C, E].

        OLMoE, section 5.3 (domains) and 5.4 (token ids). By chance top / E.
        """
        return self.counts / np.maximum(self.tokens, 1)[None, :, None]

    def distribution(self) -> np.ndarray:
        """Share of a class's choices that an expert holds; adds up to 1: float64 [L, C, E]."""
        total = self.counts.sum(2, keepdims=True, dtype=np.int64)
        return self.counts / np.maximum(total, 1)


def token_classes(named: Sequence[str]) -> dict[str, str]:
    """Patterns by name, from ``NAME=REGEX``.

    Raises:
        UserError: one has no name, or is no regular expression.
    """
    found = {}
    for one in named:
        name, equals, pattern = one.partition("=")
        if not (name and equals):
            raise UserError(f"--token-class {one}: give NAME=REGEX, such as digits=[0-9]+")
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"--token-class {one}: not a regular expression: {error}") from error
        found[name] = pattern
    return found


def by_token_class(
    by_id: ClassCounts, show: Callable[[int], str], patterns: Mapping[str, str]
) -> ClassCounts:
    """Counts of token ids added up by class: the first pattern that is all of an id's text.

    The last class, one more than ``patterns``, is of ids that none fits.
    """
    layers, _, experts = by_id.counts.shape
    found = ClassCounts(layers, len(patterns) + 1, experts)
    seen = np.flatnonzero(by_id.tokens)
    rules = [re.compile(pattern) for pattern in patterns.values()]
    for token in seen.tolist():
        text = show(token)
        which = next((n for n, rule in enumerate(rules) if rule.fullmatch(text)), len(rules))
        found.counts[:, which] += by_id.counts[:, token]
        found.tokens[which] += by_id.tokens[token]
    return found


def vocabulary_specialization(counts: ClassCounts, min_tokens: int = 10) -> np.ndarray:
    """Mean over token ids of the share that an id's most frequent expert holds: float64 [L].

    OLMoE, section 5.4, with ``counts`` of top-1 choices by token id. 1 when the id alone decides.
    Ids seen fewer than ``min_tokens`` times are left out: a rare id looks special by chance.
    """
    seen = counts.tokens >= min_tokens
    if not seen.any():
        return np.zeros(len(counts.counts))
    return counts.counts[:, seen].max(2).__truediv__(counts.tokens[seen]).mean(1)


def routing_entropy(counts: ClassCounts) -> np.ndarray:
    """H = -sum_i p_i ln p_i in nats, float64 [L, C]; p_i the share of a class's choices (ST-MoE,
    Table 14, where the class is that of sentinel tokens). ln E when uniform.
    """
    p = counts.distribution()
    return -np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0)), 0.0).sum(2)


def spread(counts: ClassCounts, min_tokens: int = 129) -> np.ndarray:
    """Mean over classes of the standard deviation over experts of their share: float64 [L].

    OpenMoE's measure of context-independent specialisation: large for token ids, near 0 for
    position ids. 0 when every class is spread evenly, sqrt(E - 1) / E when each has one expert.
    Classes seen fewer than ``min_tokens`` times are left out (OpenMoE: more than 128).
    """
    seen = counts.tokens >= min_tokens
    if not seen.any():
        return np.zeros(len(counts.counts))
    return counts.distribution()[:, seen].std(2).mean(1)


def top_classes(
    counts: ClassCounts, layer: int, min_tokens: int = 10, size: int = 10
) -> list[list[tuple[int, float]]]:
    """For each expert the classes with the largest share of their tokens on it: (class, share)."""
    seen = np.flatnonzero(counts.tokens >= min_tokens)
    shares_CE = counts.counts[layer, seen] / counts.tokens[seen, None]
    best = np.argsort(-shares_CE, axis=0, kind="stable")[:size]
    return [
        [(int(seen[c]), float(shares_CE[c, e])) for c in best[:, e] if shares_CE[c, e] > 0]
        for e in range(shares_CE.shape[1])
    ]


def token_class_entropy(result: dict[str, Any], min_tokens: int = 1000) -> dict[str, np.ndarray]:
    """Entropy by layer [L] of each class of ``result["token_classes"]``; rare ones left out.

    Few tokens cannot visit many experts, so that their entropy is low by chance. Empty for results
    of a version that did not count classes.
    """
    if (classes := result.get("token_classes")) is None:
        return {}
    by_class = np.array(classes["entropy"]).T
    rows = zip(classes["names"], classes["tokens"], by_class, strict=True)
    return {name: entropy for name, tokens, entropy in rows if tokens >= min_tokens}
