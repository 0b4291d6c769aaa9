"""Where a model sent tokens: the one form that every analysis reads.

Shapes: L layers with experts, T tokens, K the most experts that a token chose, E experts, S tokens
of a window, B windows.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Routed:
    """Choices of some tokens, in the order that they were given."""

    ranked_LTK: np.ndarray
    """Experts that a token chose, best first: int16 [L, T, K]; -1 where it chose fewer than K."""
    kept_LTE: np.ndarray
    """Choices that an expert served: bool [L, T, E]; others were dropped for want of capacity."""
    predicted_T: np.ndarray
    """The token id that the model holds likeliest to come next: int64 [T]; -1 where not asked."""

    def chosen_LTE(self, top: int | None = None) -> np.ndarray:
        """Whether a token counts an expert among its best ``top`` (None: all): bool [L, T, E]."""
        return chosen(self.ranked_LTK[:, :, :top], self.kept_LTE.shape[2])


def chosen(ranked_LTK: np.ndarray, num_experts: int) -> np.ndarray:
    """Ranked choices (int [L, T, K], -1: none) as a map, bool [L, T, E]."""
    layers, tokens, _ = ranked_LTK.shape
    chosen_LTE = np.zeros((layers, tokens, num_experts + 1), dtype=bool)
    np.put_along_axis(chosen_LTE, ranked_LTK.astype(np.int64), True, axis=2)  # -1: the column over
    return chosen_LTE[:, :, :num_experts]


@dataclass(frozen=True)
class Windows:
    """Some windows of one class of text."""

    name: str
    """The class: a domain, a language, a task."""
    tokens_BS: np.ndarray
    """int64 [B, S]."""
    labels_BS: np.ndarray
    """The token that follows each, int64 [B, S]."""


class RoutedModel(Protocol):
    """A model whose routing can be watched."""

    layers: list[int]
    """Layers with experts that are watched, counted from 0."""
    num_experts: int
    topk: int
    vocab_size: int
    """Ids that it can read and predict."""

    def route(self, tokens_BS: np.ndarray, predict: bool = True) -> Routed:
        """Run the model over windows int64 [B, S] in evaluation mode; T = B x S, row by row.

        Without ``predict`` nothing is predicted, which spares the vocabulary's matrix.
        """
        ...

    def weights(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each layer the router's rows [E, H] and all weights of each expert [E, n]."""
        ...
