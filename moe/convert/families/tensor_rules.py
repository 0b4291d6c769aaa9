"""Which of our tensors is which of HuggingFace's, as reversible rules.

A rule turns one global tensor of a checkpoint into a list of HuggingFace's and back. Transforms
only cut and join, so that values pass bit by bit; they run on meta tensors too, which gives shapes
before anything is read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Transform(Protocol):
    """A reversible cut of one tensor."""

    def split(self, ours: Tensor) -> list[Tensor]:
        """Ours to theirs, views where that is possible."""
        ...

    def join(self, theirs: Sequence[Tensor]) -> Tensor:
        """Theirs to ours."""
        ...


@dataclass(frozen=True)
class Whole:
    """The same tensor."""

    def split(self, ours: Tensor) -> list[Tensor]:
        """[...] -> [...]."""
        return [ours]

    def join(self, theirs: Sequence[Tensor]) -> Tensor:
        """[...] -> [...]."""
        (tensor,) = theirs
        return tensor


@dataclass(frozen=True)
class FirstRows:
    """The first ``rows``: what follows is padding that only some layouts need."""

    rows: int

    def split(self, ours: Tensor) -> list[Tensor]:
        """[padded rows, ...] -> [rows, ...]."""
        return [ours[: self.rows]]

    def join(self, theirs: Sequence[Tensor]) -> Tensor:
        """[rows, ...] -> [rows, ...]: another layout pads when it loads."""
        (tensor,) = theirs
        return tensor


@dataclass(frozen=True)
class QueryKeyValue:
    """Megatron's fused projection: for each key/value head its query heads, then key, then value.

    Works on weights [rows, H] and biases [rows].
    """

    heads: int
    groups: int
    """Key/value heads."""
    head_dim: int

    def split(self, ours: Tensor) -> list[Tensor]:
        """[(heads + 2 groups) head_dim, ...] -> q [heads head_dim, ...], k, v [groups ..., ...]."""
        per_group = self.heads // self.groups
        grouped = ours.unflatten(0, (self.groups, per_group + 2, self.head_dim))
        parts = grouped.split([per_group, 1, 1], dim=1)
        return [part.flatten(0, 2) for part in parts]

    def join(self, theirs: Sequence[Tensor]) -> Tensor:
        """The inverse."""
        parts = [part.unflatten(0, (self.groups, -1, self.head_dim)) for part in theirs]
        return torch.cat(parts, dim=1).flatten(0, 2)


@dataclass(frozen=True)
class GateUp:
    """A gated FFN's first matrix: gate above up, and above linear where there are three parts."""

    parts: int = 2

    def split(self, ours: Tensor) -> list[Tensor]:
        """[parts F, ...] -> gate [F, ...], up [F, ...], ..."""
        return list(ours.chunk(self.parts))

    def join(self, theirs: Sequence[Tensor]) -> Tensor:
        """The inverse."""
        return torch.cat(list(theirs))


@dataclass(frozen=True)
class PerExpert:
    """A stack over experts, cut into experts and each of these by another transform."""

    experts: int
    inner: Transform

    def split(self, ours: Tensor) -> list[Tensor]:
        """[E, ...] -> the parts of expert 0, then those of expert 1, ..."""
        return [part for expert in ours for part in self.inner.split(expert)]

    def join(self, theirs: Sequence[Tensor]) -> Tensor:
        """The inverse."""
        parts = len(theirs) // self.experts
        first = self.inner.join(theirs[:parts])
        ours = first.new_empty((self.experts, *first.shape))
        for expert in range(self.experts):  # a list of all would need the memory twice
            ours[expert] = self.inner.join(theirs[expert * parts : (expert + 1) * parts])
        return ours


@dataclass(frozen=True)
class Rule:
    """One of our tensors and those of HuggingFace that hold its values."""

    ours: str
    theirs: tuple[str, ...]
    transform: Transform = Whole()
    fp32: bool = False
    """Stored in fp32 whatever the weights' type."""
