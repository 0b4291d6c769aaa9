"""Specialisation: dependence of routing on classes of tokens.

Every token has one class of each kind: the domain, language or task of its text, its position, its
id, the predicted next id, the true next id.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from moetron.common.errors import UserError
from moetron.moe.analysis.routing_trace import Routed

SENTINELS = "sentinels"
"""Name of ST-MoE's token class."""


class ClassCounts:
    """Number of tokens of each class that have each expert among their best.

    Memory: 4 L C E bytes. ``counts`` int32 [L, C, E]; ``tokens`` int64 [C].
    """

    def __init__(self, layers: int, classes: int, experts: int, top: int | None = None) -> None:
        self.counts = np.zeros((layers, classes, experts), dtype=np.int32)
        self.tokens = np.zeros(classes, dtype=np.int64)
        self._top = top

    def add(self, classes_T: np.ndarray, routed: Routed) -> None:
        """Count tokens with classes int [T]."""
        self.tokens += np.bincount(classes_T, minlength=len(self.tokens))
        ranked_LTK = routed.ranked_LTK[:, :, : self._top].astype(np.int64)
        _, classes, experts = self.counts.shape
        cells = classes_T[:, None] * experts + ranked_LTK
        for layer, cells_TK in enumerate(cells):
            flat = cells_TK[ranked_LTK[layer] >= 0]
            cell, count = np.unique(flat, return_counts=True)
            self.counts[layer].reshape(classes * experts)[cell] += count.astype(np.int32)

    def shares(self) -> np.ndarray:
        """Return N(Ei, c) / N(c): the share of class c routed to expert i, float64 [L, C, E].

        OLMoE, section 5.3 (domains) and 5.4 (token ids). By chance top / E.
        """
        return self.counts / np.maximum(self.tokens, 1)[None, :, None]

    def distribution(self) -> np.ndarray:
        """Return the distribution of a class's choices over experts, float64 [L, C, E]."""
        total = self.counts.sum(2, keepdims=True, dtype=np.int64)
        return self.counts / np.maximum(total, 1)


def token_classes(named: Sequence[str]) -> dict[str, str]:
    """Parse ``NAME=REGEX`` to patterns by name.

    Raises:
        UserError: a name is missing or a regular expression is invalid.
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
    """Sum counts of token ids by class: the first pattern that matches the id's full text.

    Ids that no pattern matches are in an additional last class.
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
    """Return the mean over token ids of the share of an id's most frequent expert: float64 [L].

    OLMoE, section 5.4, with ``counts`` of top-1 choices by token id. 1 if routing depends only on
    the id. Ids with fewer than ``min_tokens`` tokens are left out: they look special by chance.
    """
    seen = counts.tokens >= min_tokens
    if not seen.any():
        return np.zeros(len(counts.counts))
    return counts.counts[:, seen].max(2).__truediv__(counts.tokens[seen]).mean(1)


def routing_entropy(counts: ClassCounts) -> np.ndarray:
    """Return H = -sum_i p_i ln p_i in nats, float64 [L, C]; ln E if uniform.

    p_i is expert i's share of a class's choices (ST-MoE, Table 14, for sentinel tokens).
    """
    p = counts.distribution()
    return -np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0)), 0.0).sum(2)


def spread(counts: ClassCounts, min_tokens: int = 129) -> np.ndarray:
    """Return the standard deviation of shares over experts, averaged over classes: float64 [L].

    OpenMoE's measure of context-independent specialisation: large for token ids, near 0 for
    position ids. 0 for evenly spread classes, sqrt(E - 1) / E for one expert per class.
    Classes with fewer than ``min_tokens`` tokens are left out (OpenMoE: more than 128).
    """
    seen = counts.tokens >= min_tokens
    if not seen.any():
        return np.zeros(len(counts.counts))
    return counts.distribution()[:, seen].std(2).mean(1)


def top_classes(
    counts: ClassCounts, layer: int, min_tokens: int = 10, size: int = 10
) -> list[list[tuple[int, float]]]:
    """Return for each expert the (class, share) with the largest shares of tokens on it."""
    seen = np.flatnonzero(counts.tokens >= min_tokens)
    shares_CE = counts.counts[layer, seen] / counts.tokens[seen, None]
    best = np.argsort(-shares_CE, axis=0, kind="stable")[:size]
    return [
        [(int(seen[c]), float(shares_CE[c, e])) for c in best[:, e] if shares_CE[c, e] > 0]
        for e in range(shares_CE.shape[1])
    ]


def token_class_entropy(result: dict[str, Any], min_tokens: int = 1000) -> dict[str, np.ndarray]:
    """Return the entropy [L] of each class of ``result["token_classes"]`` without rare classes.

    Few tokens cannot reach many experts, so their entropy is low by chance. Empty for results of
    versions that did not count classes.
    """
    if (classes := result.get("token_classes")) is None:
        return {}
    by_class = np.array(classes["entropy"]).T
    rows = zip(classes["names"], classes["tokens"], by_class, strict=True)
    return {name: entropy for name, tokens, entropy in rows if tokens >= min_tokens}


def entropy_rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return table 14: a heading, and the entropy of each stack's layers in nats by token class.

    The last row is that of uniform choices.
    """
    depth = max(len(found["layers"]) for found in result["stacks"].values())
    rows = [("stack", "tokens", *(f"layer {n + 1}" for n in range(depth)))]
    for stack, found in result["stacks"].items():
        entropies = {"all": found["entropy"], **token_class_entropy(found, min_tokens=1)}
        for name, values in entropies.items():
            cells = [f"{value:.2f}" for value in values]
            rows.append((stack, name, *cells, *([""] * (depth - len(cells)))))
    uniform = f"{result['chance']['entropy']:.2f}"
    return [*rows, ("uniform", "", *([uniform] * depth))]
