"""Expert capacity: how many tokens an expert keeps, and which ones.

Shape suffixes: G groups, T tokens of a group, E experts; S positions of B sequences.

Each token chooses k of E experts; an expert keeps at most C of the tokens that chose it and drops
the others. Every rank that holds tokens of a group must see all of its rows to reach the same
result, so the caller gathers them first (`Router.within_capacity`); nothing here communicates.
Policies that depend on order keep earlier rows first. A choice has a priority, its probability;
other entries are `NOT_CHOSEN`.
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
    """Rule for C; the fields are the settings of the same names."""

    factor: float
    eval_factor: float | None = None
    minimum: int = 0
    includes_topk: bool = True

    def slots(self, tokens: int, experts: int, topk: int, training: bool) -> int:
        """Return C by the rule of `expert_slots`, at least 1.

        The minimum matters for short texts; config/rules/experts.py checks a run's own batches.
        """
        factor = self.factor if training or self.eval_factor is None else self.eval_factor
        slots = expert_slots(factor, tokens, experts, topk, self.includes_topk, self.minimum)
        return max(slots, 1)


def kept_choices(priority_GTE: torch.Tensor, slots: int, policy: Policy, most: int) -> torch.Tensor:
    """Return the choices that get a slot: bool [G, T, E], at most ``slots`` per expert and group.

    Args:
        priority_GTE: any float type.
        slots: C.
        policy: order of priority:

            - "probs": choices of higher probability, ties by row (Megatron-LM);
            - "position": choices of earlier rows;
            - "choice": first choices of all tokens, by row, then second choices, and so on
              (GShard, arXiv 2006.16668, algorithm 1; flaxformer, OpenMoE);
            - "batch_prioritized": as "choice", but tokens ordered by their highest probability
              (V-MoE's BPR, arXiv 2106.05974, section 4.2), so that a token's rank depends on later
              tokens.
        most: largest number of choices of a token; the last two policies need it.
    """
    if policy == "probs":
        return _best(priority_GTE, slots)
    if policy == "position":
        return _first(priority_GTE > NOT_CHOSEN, slots)
    if policy == "choice":
        return _first_choices_first(priority_GTE, slots, most)
    order_GT = priority_GTE.amax(2).argsort(dim=1, descending=True, stable=True)
    order_GTE = order_GT.unsqueeze(2).expand_as(priority_GTE)
    kept_GTE = _first_choices_first(priority_GTE.gather(1, order_GTE), slots, most)
    return torch.zeros_like(kept_GTE).scatter(1, order_GTE, kept_GTE)


def _best(priority_GTE: torch.Tensor, slots: int) -> torch.Tensor:
    chosen_GTE = priority_GTE > NOT_CHOSEN
    # topk breaks ties arbitrarily: use its smallest value as a threshold and keep ties by row.
    threshold_G1E = priority_GTE.topk(slots, dim=1, sorted=False).values.amin(1, keepdim=True)
    above_GTE = priority_GTE > threshold_G1E
    equal_GTE = chosen_GTE & (priority_GTE == threshold_G1E)
    return above_GTE | _first(equal_GTE, slots - above_GTE.sum(1, keepdim=True))


def _first_choices_first(priority_GTE: torch.Tensor, slots: int, most: int) -> torch.Tensor:
    order_GTE = priority_GTE.argsort(dim=2, descending=True, stable=True)
    place_GTE = order_GTE.argsort(dim=2)  # 0: the token's first choice
    chosen_GTE = priority_GTE > NOT_CHOSEN
    kept_GTE = torch.zeros_like(chosen_GTE)
    for place in range(most):  # not the actual maximum, for which the host would wait
        free_G1E = slots - kept_GTE.sum(1, keepdim=True)
        kept_GTE |= _first(chosen_GTE & (place_GTE == place), free_G1E)
    return kept_GTE


def fill_free_slots(kept_GTE: torch.Tensor, slots: int) -> torch.Tensor:
    """Return ``kept_GTE`` with the free slots of each expert filled by the first other rows."""
    return kept_GTE | _first(~kept_GTE, slots - kept_GTE.sum(1, keepdim=True))


def _first(map_GTE: torch.Tensor, count: int | torch.Tensor) -> torch.Tensor:
    """Return the first ``count`` true rows of each column; ``count`` may be [G, 1, E]."""
    return map_GTE & (map_GTE.cumsum(1, dtype=torch.int32) <= count)


def to_groups(rows_SBE: torch.Tensor, scope: Scope) -> torch.Tensor:
    """Reshape [S, B, E] to groups [G, T, E]: one per sequence, or one of all sequences in order."""
    rows_BSE = rows_SBE.transpose(0, 1)
    return rows_BSE if scope == "sequence" else rows_BSE.flatten(0, 1).unsqueeze(0)


def from_groups(rows_GTE: torch.Tensor, batch: int) -> torch.Tensor:
    """Undo `to_groups` for B = ``batch``."""
    return rows_GTE.flatten(0, 1).unflatten(0, (batch, -1)).transpose(0, 1)
