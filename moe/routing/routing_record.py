"""Recorder of routing: load of experts, dropped choices and their positions.

Shape suffixes: L layers with experts, E experts, T tokens of this rank, s positions on this rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import ProcessGroup

from moetron.moe.config.schema import derived
from moetron.moe.config.schema.settings import Settings
from moetron.moe.routing.router import Router

POSITION_BUCKETS = 16
"""Equal parts of a sequence for which drops are counted."""


@dataclass(frozen=True)
class RoutingSummary:
    """Choices of tokens since the last reset, over all ranks of the summary's group.

    ``chosen`` and ``kept`` are int64 [MoE layers, experts] on the CPU: choices before and after
    capacity drops some. ``chosen_at`` and ``kept_at`` are the same choices by the token's position
    in its sequence, int64 [MoE layers, `POSITION_BUCKETS`], of layers with a capacity; 0 in others,
    which drop nothing. All tokens count, also those without loss, but padding does not.
    """

    chosen: torch.Tensor
    kept: torch.Tensor
    chosen_at: torch.Tensor
    kept_at: torch.Tensor

    @classmethod
    def of(cls, counts: torch.Tensor) -> "RoutingSummary":
        """Return the summary of `RoutingRecorder.counts`, summed over ranks, on the CPU."""
        experts = counts.shape[-1] - POSITION_BUCKETS
        (chosen, chosen_at), (kept, kept_at) = (
            part.split([experts, POSITION_BUCKETS], dim=1) for part in counts
        )
        return cls(chosen, kept, chosen_at, kept_at)

    @property
    def dropped_fraction(self) -> float:
        """Fraction of all choices that were dropped; 0 when nothing was routed."""
        total = int(self.chosen.sum())
        return 1.0 - int(self.kept.sum()) / total if total else 0.0

    @property
    def dropped_fractions(self) -> list[float]:
        """The same for each layer."""
        return _missing(self.chosen.sum(1), self.kept.sum(1))

    @property
    def dropped_by_position(self) -> list[list[float]]:
        """For each layer the fraction of dropped choices in each part of the sequence."""
        return _missing(self.chosen_at, self.kept_at)

    @property
    def load_max_over_mean(self) -> float:
        """Load of the busiest expert over the mean load, averaged over layers; 1 is balanced."""
        chosen_LE = self.chosen.double()  # [MoE layers, experts]
        mean_L = chosen_LE.mean(dim=1).clamp(min=1.0)
        return float((chosen_LE.amax(dim=1) / mean_L).mean())


def _missing(before: torch.Tensor, after: torch.Tensor) -> Any:
    """Return 1 - after / before, 0 where ``before`` is 0; as (nested) lists."""
    return (1.0 - after.double() / before.clamp(min=1)).where(before > 0, 0.0).tolist()


class RoutingRecorder:
    """Counter of the routers' choices in training passes (once per micro-batch if recomputed).

    Counts stay on the device: nothing waits for it before `summary`, or whoever reads `counts`. Use
    it as a context manager, or call `close`.

    Args:
        model: this rank's model chunks, wrapped or not.
        settings: which layers have experts, and how many.
    """

    counts: torch.Tensor
    """This rank's, int64 [2, MoE layers, experts + `POSITION_BUCKETS`]: chosen, then kept."""

    def __init__(self, model: Sequence[torch.nn.Module], settings: Settings) -> None:
        experts = settings.moe.num_experts
        assert experts is not None
        flags = derived.routed_layers(settings)
        self._row = {layer: row for row, layer in enumerate(i for i, f in enumerate(flags) if f)}
        routers = [m for chunk in model for m in chunk.modules() if isinstance(m, Router)]
        found = (parameter.device for chunk in model for parameter in chunk.parameters())
        device = next(found, torch.device("cpu"))
        self._experts = experts
        shape = (2, len(self._row), experts + POSITION_BUCKETS)
        self.counts = torch.zeros(shape, dtype=torch.int64, device=device)
        self._hooks = [router.register_forward_hook(self._count) for router in routers]

    def _count(
        self, router: Router, inputs: Any, output: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        if not (router.training and torch.is_grad_enabled()):
            return
        counts = self.counts[:, self._row[router.layer_number - 1]]
        if router.capacity is None:
            # Kept as well as chosen. ``+=`` on a slice would copy it back onto itself.
            counts[:, : self._experts].add_(router.choices_of_experts())
            return
        # A map padded to capacity also holds tokens that did not choose the expert.
        chosen_TE = router.chosen
        assert chosen_TE is not None
        kept_TE = output[1] & chosen_TE
        rows = len(inputs[0])  # of [s, b, H]
        bucket_s = router.tokens.parts_of_sequence(rows, POSITION_BUCKETS, counts.device)
        for count, map_TE in zip(counts, (chosen_TE, kept_TE), strict=True):
            count[: self._experts].add_(map_TE.sum(0))
            count[self._experts :].index_add_(0, bucket_s, map_TE.sum(1).view(rows, -1).sum(1))

    def reset(self) -> None:
        """Clear all counts."""
        self.counts.zero_()

    def summary(self, group: ProcessGroup | None = None) -> RoutingSummary:
        """Return the sums over ``group`` (collective; None: all ranks)."""
        counts = self.counts.clone()
        if torch.distributed.is_initialized():
            # All-reduce over ``group``: every rank routes different tokens or layers (tensor ranks
            # hold different positions: training experts requires sequence parallelism), so the sum
            # counts every token once.
            torch.distributed.all_reduce(counts, group=group)
        return RoutingSummary.of(counts.cpu())

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> "RoutingRecorder":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
