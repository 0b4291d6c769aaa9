"""Watch where tokens go, without changing it: load of every expert, share of dropped choices."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch.distributed import ProcessGroup

from moetron.moe.config import derived
from moetron.moe.config.settings import Settings
from moetron.moe.routing.router import Router


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
    def dropped_fractions(self) -> list[float]:
        """The same for each layer."""
        chosen_L, kept_L = self.chosen.sum(1), self.kept.sum(1)
        return (1.0 - kept_L.double() / chosen_L.clamp(min=1)).where(chosen_L > 0, 0.0).tolist()

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
        flags = derived.routed_layers(settings)
        self._row = {layer: row for row, layer in enumerate(i for i, f in enumerate(flags) if f)}
        routers = [m for chunk in model for m in chunk.modules() if isinstance(m, Router)]
        device = routers[0].weight.device if routers else torch.device("cpu")
        self._counts = torch.zeros(2, len(self._row), experts, dtype=torch.int64, device=device)
        self._hooks = [router.register_forward_hook(self._count) for router in routers]

    def _count(self, router: Router, _: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        if not (router.training and torch.is_grad_enabled()):
            return
        kept_TE = output[1]  # [tokens, experts]
        assert router.chosen is not None
        row = self._row[router.layer_number - 1]
        self._counts[0, row] += router.chosen.sum(dim=0)
        # A map padded to capacity also holds tokens that did not choose the expert.
        self._counts[1, row] += (kept_TE & router.chosen).sum(dim=0)

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

    def __enter__(self) -> "RoutingRecorder":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
