"""Routing of tokens, the common input of all analyses.

Shapes: L MoE layers, T tokens, K the largest number of experts of a token, E experts, S tokens per
window, B windows.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Routed:
    """Routing of tokens, in input order."""

    ranked_LTK: np.ndarray
    """Chosen experts, best first: int16 [L, T, K], padded with -1."""
    kept_LTE: np.ndarray
    """Kept choices: bool [L, T, E]; other choices were dropped by capacity."""
    predicted_T: np.ndarray
    """Most likely next token id: int64 [T]; -1 if not predicted."""

    def chosen_LTE(self, top: int | None = None) -> np.ndarray:
        """Return the map of the best ``top`` (None: all) choices, bool [L, T, E]."""
        return chosen(self.ranked_LTK[:, :, :top], self.kept_LTE.shape[2])


def chosen(ranked_LTK: np.ndarray, num_experts: int) -> np.ndarray:
    """Convert ranked choices (int [L, T, K], -1: none) to a map, bool [L, T, E]."""
    layers, tokens, _ = ranked_LTK.shape
    chosen_LTE = np.zeros((layers, tokens, num_experts + 1), dtype=bool)
    np.put_along_axis(chosen_LTE, ranked_LTK.astype(np.int64), True, axis=2)  # -1: extra column
    return chosen_LTE[:, :, :num_experts]


@dataclass(frozen=True)
class Windows:
    """Windows of one class of text."""

    name: str
    """Domain, language or task."""
    tokens_BS: np.ndarray
    """int64 [B, S]."""
    labels_BS: np.ndarray
    """Next tokens, int64 [B, S]."""


class RoutedModel(Protocol):
    """Model whose routing can be analysed."""

    layers: list[int]
    """Analysed MoE layers, from 0."""
    num_experts: int
    topk: int
    vocab_size: int
    """Number of token ids."""

    def route(self, tokens_BS: np.ndarray, predict: bool = True) -> Routed:
        """Run the model over windows int64 [B, S] in evaluation mode; T = B x S, row by row.

        Without ``predict`` the output matrix is not applied.
        """
        ...

    def weights(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return for each layer the router rows [E, H] and all weights of each expert [E, n]."""
        ...
