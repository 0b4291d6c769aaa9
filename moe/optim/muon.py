"""Muon for matrices, stacked experts and matrices cut over tensor ranks among them; else AdamW."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moetron.moe.optim.tensor_shards import Cut

QUINTIC = (3.4445, -4.7750, 2.0315)
SMALLEST_NORM = 1e-7


def orthogonalized(matrices: Tensor, iterations: int) -> Tensor:
    """U V^T of each matrix U S V^T in [..., rows, columns], roughly: S becomes 0.7 to 1.2.

    Newton-Schulz iteration x -> a x + (b x x^T + c (x x^T)^2) x with the coefficients of Jordan et
    al. 2024 (kellerjordan.github.io/posts/muon), in the matrices' own precision.
    """
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=SMALLEST_NORM)
    a, b, c = QUINTIC
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x


@dataclass(frozen=True)
class MuonRule:
    """The settings ``muon_*``."""

    momentum: float = 0.95
    iterations: int = 5
    scale: float = 0.2


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al. 2024) as Moonlight scales it (arXiv 2502.16982, section 2.2).

    With gradient g of a matrix of m rows and n columns and momentum mu:

    - M = mu M + (1 - mu) g, u = mu M + (1 - mu) g (Nesterov);
    - p is decayed by lr x weight_decay and moves by -lr x scale x sqrt(max(m, n)) x U V^T of u.

    With scale 0.2 an update's root mean square is that of a usual AdamW update, so that one
    learning rate and weight decay serve both. Axes before the last two count matrices (experts),
    each with a U V^T of its own. Of a matrix that is cut over ranks every rank gathers the whole u
    and computes the same. A matrix is what megatron-core packs into one: queries, keys and values;
    gate and up. torch.optim.Muon knows neither stacks nor cuts, and computes in bf16.

    Args:
        params: groups with ``lr`` and ``weight_decay``.
        cuts: parameters that Muon moves, None: whole on every rank. AdamW moves the others.
        rule: how.
        adamw: further arguments of AdamW.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        cuts: Mapping[Tensor, Cut | None],
        rule: MuonRule,
        **adamw: Any,
    ) -> None:
        super().__init__(params, **adamw)
        self._cuts = dict(cuts)
        self._rule = rule

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient (collective over the ranks of cuts)."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in self._cuts and parameter.grad is not None:
                    self._update(parameter, group["lr"], group["weight_decay"])
                    parameter.grad = None  # so that AdamW passes it by
        super().step()

    def moments(self, parameter: Tensor) -> tuple[str, ...]:
        """Names of what is kept of a parameter."""
        return ("momentum_buffer",) if parameter in self._cuts else ("exp_avg", "exp_avg_sq")

    def state_numel(self, parameter: Tensor) -> int:
        """Numbers kept of a parameter on this rank."""
        return parameter.numel() * len(self.moments(parameter))

    def _update(self, parameter: Tensor, lr: float, decay: float) -> None:
        rule, state, cut = self._rule, self.state[parameter], self._cuts[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum = state["momentum_buffer"].lerp_(parameter.grad, 1 - rule.momentum)
        ahead = parameter.grad.lerp(momentum, rule.momentum)  # type: ignore[union-attr]
        parts = [ahead] if cut is None else _gathered(ahead, cut)
        axis = -1 if cut is None else cut.axis
        whole = torch.cat(parts, dim=axis)
        size = math.sqrt(max(whole.shape[-2:]))
        turned = orthogonalized(whole, rule.iterations).chunk(len(parts), dim=axis)
        own = turned[0 if cut is None else cut.group.rank()]
        parameter.mul_(1 - lr * decay).sub_(own, alpha=lr * rule.scale * size)


def _gathered(part: Tensor, cut: Cut) -> list[Tensor]:
    """The parts of all ranks that share a matrix."""
    parts = [torch.empty_like(part) for _ in range(cut.group.size())]
    dist.all_gather(parts, part.contiguous(), group=cut.group)
    return parts
