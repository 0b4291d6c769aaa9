"""Expert capacity: how many tokens an expert takes, and which ones.

T tokens of a group each choose k of E experts; an expert serves at most C of those that chose it,
the others skip it. G groups stand side by side, [G, T, E]; rows stand in the order in which tokens
are served, as far as order counts. A choice has a merit, its probability; what is no choice has
`NOT_CHOSEN`.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from moetron.moe.config.schema.derived import expert_slots

Policy = Literal["probs", "position", "choice", "batch_prioritized"]
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
        """C: the rule of `expert_slots`, at least 1, so that an expert can always serve.

        A run's own batches have more (config/rules/experts.py); a short text may not.
        """
        factor = self.factor if training or self.eval_factor is None else self.eval_factor
        slots = expert_slots(factor, tokens, experts, topk, self.includes_topk, self.minimum)
        return max(slots, 1)


def served(merit_GTE: torch.Tensor, slots: int, policy: Policy) -> torch.Tensor:
    """The choices that find a slot: bool [G, T, E], at most ``slots`` of each expert in a group.

    Args:
        merit_GTE: any float type.
        slots: C.
        policy: who comes first:

            - "probs": choices of higher probability, equal ones by row (Megatron-LM);
            - "position": choices of earlier rows;
            - "choice": every token's first choice, by row, then every second one, and so on
              (GShard, arXiv 2006.16668, algorithm 1; flaxformer, OpenMoE);
            - "batch_prioritized": as "choice", but tokens by their highest probability (V-MoE's
              BPR, arXiv 2106.05974, section 4.2). A token's place depends on later tokens.
    """
    if policy == "probs":
        return _best(merit_GTE, slots)
    if policy == "position":
        return _first(merit_GTE > NOT_CHOSEN, slots)
    if policy == "choice":
        return _first_choices_first(merit_GTE, slots)
    order_GT = merit_GTE.amax(2).argsort(dim=1, descending=True, stable=True)
    order_GTE = order_GT.unsqueeze(2).expand_as(merit_GTE)
    kept_GTE = _first_choices_first(merit_GTE.gather(1, order_GTE), slots)
    return torch.zeros_like(kept_GTE).scatter(1, order_GTE, kept_GTE)


def _best(merit_GTE: torch.Tensor, slots: int) -> torch.Tensor:
    chosen_GTE = merit_GTE > NOT_CHOSEN
    # A top-k breaks ties at will: take its last value, and of the choices worth that the first.
    threshold_G1E = merit_GTE.topk(slots, dim=1, sorted=False).values.amin(1, keepdim=True)
    above_GTE = merit_GTE > threshold_G1E
    equal_GTE = chosen_GTE & (merit_GTE == threshold_G1E)
    return above_GTE | _first(equal_GTE, slots - above_GTE.sum(1, keepdim=True))


def _first_choices_first(merit_GTE: torch.Tensor, slots: int) -> torch.Tensor:
    order_GTE = merit_GTE.argsort(dim=2, descending=True, stable=True)
    place_GTE = order_GTE.argsort(dim=2)  # 0: the token's first choice
    chosen_GTE = merit_GTE > NOT_CHOSEN
    kept_GTE = torch.zeros_like(chosen_GTE)
    for place in range(int(chosen_GTE.sum(2).amax())):
        free_G1E = slots - kept_GTE.sum(1, keepdim=True)
        kept_GTE |= _first(chosen_GTE & (place_GTE == place), free_G1E)
    return kept_GTE


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
