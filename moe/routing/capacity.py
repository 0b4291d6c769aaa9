"""Expert capacity: how many tokens an expert takes, and which ones.

T tokens of a group each choose k of E experts; an expert serves at most C of those that chose it,
the others skip it. G groups stand side by side, [G, T, E]; rows stand in the order in which tokens
are served, as far as order counts. A choice has a merit, its probability; what is no choice has
`NOT_CHOSEN`.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from megatron.core.transformer.moe.moe_utils import get_capacity

Policy = Literal["probs", "position"]
Scope = Literal["rank", "micro_batch", "sequence"]

NOT_CHOSEN = -torch.inf


@dataclass(frozen=True)
class Capacity:
    """The rule for C; the fields are the settings of the same names."""

    factor: float
    eval_factor: float | None = None
    minimum: int = 0
    includes_topk: bool = True

    def slots(self, tokens: int, experts: int, topk: int, training: bool) -> int:
        """C, at most T: no expert is chosen by more.

        - includes_topk: ceil(factor k T / E), megatron-core's (GShard, arXiv 2006.16668, k = 2);
        - otherwise round(factor T / E), halves to even: flaxformer's (moe_layers.py), the
          convention of Switch, ST-MoE and OpenMoE. With k = 2 it gives half as many slots.
        """
        factor = self.factor if training or self.eval_factor is None else self.eval_factor
        if self.includes_topk:
            slots: int = get_capacity(tokens * topk, experts, factor)
        else:
            slots = round(factor * tokens / experts)
        return min(max(slots, self.minimum), tokens)


def served(merit_GTE: torch.Tensor, slots: int, policy: Policy) -> torch.Tensor:
    """The choices that find a slot: bool [G, T, E], at most ``slots`` of each expert in a group.

    Args:
        merit_GTE: any float type.
        slots: C.
        policy: an expert serves its choices of highest probability, equal ones by row ("probs"),
            or those of the first rows ("position").
    """
    chosen_GTE = merit_GTE > NOT_CHOSEN
    if policy == "position":
        return _first(chosen_GTE, slots)
    # A top-k breaks ties at will: take its last value, and of the choices worth that the first.
    threshold_G1E = merit_GTE.topk(slots, dim=1, sorted=False).values.amin(1, keepdim=True)
    above_GTE = merit_GTE > threshold_G1E
    equal_GTE = chosen_GTE & (merit_GTE == threshold_G1E)
    return above_GTE | _first(equal_GTE, slots - above_GTE.sum(1, keepdim=True))


def filled_up(served_GTE: torch.Tensor, slots: int) -> torch.Tensor:
    """``served_GTE`` and, where an expert has free slots, the first other rows: all slots taken."""
    return served_GTE | _first(~served_GTE, slots - served_GTE.sum(1, keepdim=True))


def _first(map_GTE: torch.Tensor, count: int | torch.Tensor) -> torch.Tensor:
    """The first ``count`` (of each column: [G, 1, E]) true rows."""
    return map_GTE & (map_GTE.cumsum(1, dtype=torch.int32) <= count)


def to_groups(rows_SBE: torch.Tensor, scope: Scope) -> torch.Tensor:
    """[S, B, E] as groups [G, T, E]: each sequence, or all, one sequence after the other."""
    rows_BSE = rows_SBE.transpose(0, 1)
    return rows_BSE if scope == "sequence" else rows_BSE.flatten(0, 1).unsqueeze(0)


def from_groups(rows_GTE: torch.Tensor, batch: int) -> torch.Tensor:
    """Undo `to_groups` for B = ``batch``."""
    return rows_GTE.flatten(0, 1).unflatten(0, (batch, -1)).transpose(0, 1)
