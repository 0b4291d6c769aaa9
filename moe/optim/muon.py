"""Muon for matrices, including stacked experts and tensor-parallel shards; AdamW for the rest."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moetron.moe.optim.tensor_shards import TensorShard

QUINTIC = (3.4445, -4.7750, 2.0315)
SMALLEST_NORM = 1e-7


def orthogonalized(matrices: Tensor, iterations: int) -> Tensor:
    """Return about U V^T of each matrix U S V^T in [..., rows, columns]: S becomes 0.7 to 1.2.

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

    With scale 0.2 an update's root mean square is that of a typical AdamW update, so that both use
    one learning rate and weight decay. Axes before the last two index matrices (experts), each with
    its own U V^T. For a sharded matrix every rank gathers the full u and computes the same update.
    megatron-core packs queries, keys and values into one matrix, and gate and up. torch.optim.Muon
    supports neither stacks nor shards, and computes in bf16.

    Args:
        params: groups with ``lr`` and ``weight_decay``.
        shards: parameters that Muon updates; None: replicated. AdamW updates the others.
        rule: momentum, iterations and scale.
        adamw: further arguments of AdamW.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        shards: Mapping[Tensor, TensorShard | None],
        rule: MuonRule,
        **adamw: Any,
    ) -> None:
        super().__init__(params, **adamw)
        self._shards = dict(shards)
        self._rule = rule

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient (collective over the groups of shards)."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in self._shards and parameter.grad is not None:
                    self._update(parameter, group["lr"], group["weight_decay"])
                    parameter.grad = None  # so that AdamW skips it
        super().step()

    def moments(self, parameter: Tensor) -> tuple[str, ...]:
        """Return the names of a parameter's moments."""
        return ("momentum_buffer",) if parameter in self._shards else ("exp_avg", "exp_avg_sq")

    def state_numel(self, parameter: Tensor) -> int:
        """Return the number of elements of a parameter's moments on this rank."""
        return parameter.numel() * len(self.moments(parameter))

    def _update(self, parameter: Tensor, lr: float, decay: float) -> None:
        rule, state, shard = self._rule, self.state[parameter], self._shards[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum = state["momentum_buffer"].lerp_(parameter.grad, 1 - rule.momentum)
        ahead = parameter.grad.lerp(momentum, rule.momentum)  # type: ignore[union-attr]
        parts = [ahead] if shard is None else _gathered(ahead, shard)
        axis = -1 if shard is None else shard.axis
        full = torch.cat(parts, dim=axis)
        size = math.sqrt(max(full.shape[-2:]))
        updates = orthogonalized(full, rule.iterations).chunk(len(parts), dim=axis)
        own = updates[0 if shard is None else shard.group.rank()]
        parameter.mul_(1 - lr * decay).sub_(own, alpha=lr * rule.scale * size)


def _gathered(part: Tensor, shard: TensorShard) -> list[Tensor]:
    """Return the shards of a matrix from all ranks."""
    parts = [torch.empty_like(part) for _ in range(shard.group.size())]
    # All-gather over the tensor group (experts: their tensor group): U V^T needs the full matrix,
    # of which each rank holds some rows or columns.
    dist.all_gather(parts, part.contiguous(), group=shard.group)
    return parts
