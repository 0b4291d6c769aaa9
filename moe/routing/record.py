"""Watch where tokens go, without changing it: load of every expert, share of dropped choices."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from megatron.core.transformer.moe import router as megatron_router
from megatron.core.transformer.moe.router import TopKRouter
from torch.distributed import ProcessGroup

from moetron.moe.config import derived
from moetron.moe.config.settings import Settings


@dataclass(frozen=True)
class RoutingSummary:
    """Choices of tokens since the last reset, over all ranks of the summary's group.

    ``chosen`` and ``kept`` are int64 [MoE layers, experts] on the CPU: choices before and after
    experts dropped what exceeds their capacity. A token makes k choices in each layer.
    """

    chosen: torch.Tensor
    kept: torch.Tensor

    @property
    def dropped_fraction(self) -> float:
        """Share of all choices that no expert served; 0 when nothing was routed."""
        total = int(self.chosen.sum())
        return 1.0 - int(self.kept.sum()) / total if total else 0.0

    @property
    def load_max_over_mean(self) -> float:
        """Load of the busiest expert over the mean load, averaged over layers; 1 is balanced."""
        chosen_LE = self.chosen.double()  # [MoE layers, experts]
        mean_L = chosen_LE.mean(dim=1).clamp(min=1.0)
        return float((chosen_LE.amax(dim=1) / mean_L).mean())


class RoutingRecorder:
    """Counts the routers' choices in training passes (once where activations are recomputed).

    Use it as a context, or call `close`.

    Args:
        model: this rank's model chunks, wrapped or not.
        settings: which layers have experts, and how many.
    """

    def __init__(self, model: Sequence[torch.nn.Module], settings: Settings) -> None:
        experts = settings.moe.num_experts
        assert experts is not None
        flags = derived.moe_layers(settings)
        self._row = {layer: row for row, layer in enumerate(i for i, f in enumerate(flags) if f)}
        routers = [m for chunk in model for m in chunk.modules() if isinstance(m, TopKRouter)]
        device = routers[0].weight.device if routers else torch.device("cpu")
        self._counts = torch.zeros(2, len(self._row), experts, dtype=torch.int64, device=device)
        self._before_drop: torch.Tensor | None = None
        self._hooks = [router.register_forward_hook(self._count) for router in routers]
        self._drop = megatron_router.apply_router_token_dropping
        if settings.moe.moe_expert_capacity_factor is not None:
            megatron_router.apply_router_token_dropping = self._watched_drop

    def _watched_drop(
        self, routing_probs: torch.Tensor, routing_map: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._before_drop = routing_map
        result: tuple[torch.Tensor, torch.Tensor] = self._drop(
            routing_probs, routing_map, **options
        )
        return result

    def _count(self, router: TopKRouter, _: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        if not (router.training and torch.is_grad_enabled()):
            return
        kept_TE = output[1]  # [tokens, experts]
        chosen_TE, self._before_drop = self._before_drop, None
        row = self._row[router.layer_number - 1]
        if chosen_TE is None:
            self._counts[:, row] += kept_TE.sum(dim=0)
        else:  # a map padded to capacity also holds tokens that did not choose the expert
            self._counts[0, row] += chosen_TE.sum(dim=0)
            self._counts[1, row] += (kept_TE & chosen_TE).sum(dim=0)

    def reset(self) -> None:
        """Forget all counts."""
        self._counts.zero_()

    def summary(self, group: ProcessGroup | None = None) -> RoutingSummary:
        """Sum over ``group`` (collective; None: all ranks).

        Every rank of a model routes other tokens or other layers (tensor ranks share out a sequence
        under sequence parallelism, which training with experts demands), so that a sum over all
        ranks counts every token once.
        """
        counts = self._counts.clone()
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts, group=group)
        chosen, kept = counts.cpu()
        return RoutingSummary(chosen, kept)

    def close(self) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()
        megatron_router.apply_router_token_dropping = self._drop

    def __enter__(self) -> "RoutingRecorder":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
