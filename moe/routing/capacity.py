"""Expert capacity: how many tokens an expert takes, and which ones.

T tokens of one rank's micro-batch each choose k of E experts; an expert serves at most C of those
that chose it, the others skip it. Maps and probabilities are [T, E]; rows stand in the order in
which tokens are served, as far as order counts.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from megatron.core.transformer.moe.moe_utils import get_capacity

Policy = Literal["probs", "position"]


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


def served(
    probs_TE: torch.Tensor, chosen_TE: torch.Tensor, slots: int, policy: Policy
) -> torch.Tensor:
    """The choices that find a slot: bool [T, E], at most ``slots`` in a column.

    Args:
        probs_TE: weight of each choice, any float type.
        chosen_TE: bool.
        slots: C.
        policy: an expert serves its choices of highest probability, equal ones by row ("probs"),
            or those of the first rows ("position").
    """
    if policy == "position":
        return _first(chosen_TE, slots)
    merit_TE = probs_TE.masked_fill(~chosen_TE, -torch.inf)
    # A top-k breaks ties at will: take its last value, and of the choices worth that the first.
    threshold_E = merit_TE.topk(slots, dim=0, sorted=False).values.amin(0)
    above_TE = merit_TE > threshold_E
    equal_TE = chosen_TE & (merit_TE == threshold_E)
    return above_TE | _first(equal_TE, slots - above_TE.sum(0))


def filled_up(served_TE: torch.Tensor, slots: int) -> torch.Tensor:
    """``served_TE`` and, in columns with free slots, the first other rows: ``slots`` a column."""
    return served_TE | _first(~served_TE, slots - served_TE.sum(0))


def _first(map_TE: torch.Tensor, count: int | torch.Tensor) -> torch.Tensor:
    """The first ``count`` (of each column: [E]) true rows."""
    return map_TE & (map_TE.cumsum(0, dtype=torch.int32) <= count)


def batch_major(rows: torch.Tensor, batch: int) -> torch.Tensor:
    """Rows of a flattened [s, b] in the order of [b, s]: sequence by sequence."""
    return rows.unflatten(0, (-1, batch)).transpose(0, 1).flatten(0, 1)


def sequence_major(rows: torch.Tensor, batch: int) -> torch.Tensor:
    """Undo `batch_major`."""
    return rows.unflatten(0, (batch, -1)).transpose(0, 1).flatten(0, 1)
