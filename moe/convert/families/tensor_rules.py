"""Reversible rules between our tensors and HuggingFace's.

A rule converts one global tensor of a checkpoint to a list of HuggingFace tensors and back.
Transforms only split and concatenate, so values are bit-identical. They also run on meta tensors,
which gives shapes before values are read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Transform(Protocol):
    """Reversible split of one tensor."""

    def split(self, ours: Tensor) -> list[Tensor]:
        """Convert ours to theirs, as views where possible."""
        ...

    def join(self, theirs: Sequence[Tensor]) -> Tensor:
        """Convert theirs to ours."""
        ...


@dataclass(frozen=True)
class Whole:
    """Identity."""

    def split(self, ours: Tensor) -> list[Tensor]:
        """[...] -> [...]."""
        return [ours]

    def join(self, theirs: Sequence[Tensor]) -> Tensor:
        """[...] -> [...]."""
        (tensor,) = theirs
        return tensor


@dataclass(frozen=True)
class FirstRows:
    """First ``rows``; the rest is padding of some layouts."""

    rows: int

    def split(self, ours: Tensor) -> list[Tensor]:
        """[padded rows, ...] -> [rows, ...]."""
        return [ours[: self.rows]]

    def join(self, theirs: Sequence[Tensor]) -> Tensor:
        """[rows, ...] -> [rows, ...]; loading pads where a layout needs it."""
        (tensor,) = theirs
        return tensor


@dataclass(frozen=True)
class QueryKeyValue:
    """Megatron's fused projection: per key/value head its query heads, then key, then value.

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
        """Invert `split`."""
        parts = [part.unflatten(0, (self.groups, -1, self.head_dim)) for part in theirs]
        return torch.cat(parts, dim=1).flatten(0, 2)


@dataclass(frozen=True)
class KeyValue:
    """Megatron's fused projection of cross-attention: per head its key, then its value."""

    heads: int
    head_dim: int

    def split(self, ours: Tensor) -> list[Tensor]:
        """[2 heads head_dim, ...] -> k, v [heads head_dim, ...]."""
        by_head = ours.unflatten(0, (self.heads, 2, self.head_dim))
        return [part.flatten(0, 1) for part in by_head.unbind(1)]

    def join(self, theirs: Sequence[Tensor]) -> Tensor:
        """Invert `split`."""
        by_head = [part.unflatten(0, (self.heads, self.head_dim)) for part in theirs]
        return torch.stack(by_head, dim=1).flatten(0, 2)


@dataclass(frozen=True)
class GateUp:
    """First matrix of a gated FFN: rows of gate, up and, with three parts, linear."""

    parts: int = 2

    def split(self, ours: Tensor) -> list[Tensor]:
        """[parts F, ...] -> gate [F, ...], up [F, ...], ..."""
        return list(ours.chunk(self.parts))

    def join(self, theirs: Sequence[Tensor]) -> Tensor:
        """Invert `split`."""
        return torch.cat(list(theirs))


@dataclass(frozen=True)
class PerExpert:
    """Stack over experts, split into experts and each expert by another transform."""

    experts: int
    inner: Transform

    def split(self, ours: Tensor) -> list[Tensor]:
        """[E, ...] -> the parts of expert 0, then those of expert 1, ..."""
        return [part for expert in ours for part in self.inner.split(expert)]

    def join(self, theirs: Sequence[Tensor]) -> Tensor:
        """Invert `split`."""
        parts = len(theirs) // self.experts
        first = self.inner.join(theirs[:parts])
        ours = first.new_empty((self.experts, *first.shape))
        for expert in range(self.experts):  # torch.stack would need twice the memory
            ours[expert] = self.inner.join(theirs[expert * parts : (expert + 1) * parts])
        return ours


@dataclass(frozen=True)
class Rule:
    """Our tensor and the HuggingFace tensors with its values."""

    ours: str
    theirs: tuple[str, ...]
    transform: Transform = Whole()
    fp32: bool = False
    """Stored in fp32 whatever the dtype of the weights."""
