"""Adafactor for parameters sharded over tensor ranks."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moetron.moe.optim.tensor_shards import TensorShard

EPSILON_SQUARE = 1e-30
EPSILON_SCALE = 1e-3
FACTOR_AXIS = {"exp_avg_sq_row": -1, "exp_avg_sq_col": -2}
"""Axis of length 1 of a factored moment."""


class Adafactor(torch.optim.Optimizer):
    """Adafactor (arXiv 1804.04235, algorithm 4) without momentum, as in T5X.

    With gradient g, step t from 1 and beta = 1 - t^-decay_rate:

    - matrices of ``min_factored`` or more rows and columns keep R = beta R + (1 - beta) mean over
      columns of (g^2 + 1e-30) and C, the same over rows; u = g / sqrt(R C / mean(R));
    - other parameters keep V = beta V + (1 - beta) (g^2 + 1e-30); u = g / sqrt(V);
    - u is divided by max(1, rms(u) / clip_threshold);
    - p is decayed by lr x weight_decay and moves by -lr x max(1e-3, rms(p)) u.

    Axes before the last two index matrices (experts), each with its own rms, so that expert
    parallelism changes nothing. Means are over the ranks that hold shards of a matrix, with one
    small all-reduce each. megatron-core packs queries, keys and values into one matrix, and gate
    and up. torch.optim.Adafactor does not support shards and caps the learning rate at 1 / sqrt(t).

    Args:
        params: groups with ``lr``, and ``weight_decay`` if any.
        shards: the sharded parameters; others are replicated.
        decay_rate: of beta.
        clip_threshold: largest rms of an update.
        min_factored: rows and columns, of the full matrix, from which moments are factored.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        shards: Mapping[Tensor, TensorShard],
        decay_rate: float = 0.8,
        clip_threshold: float = 1.0,
        min_factored: int = 128,
    ) -> None:
        super().__init__(params, {"lr": 0.0, "weight_decay": 0.0, "step": 0})
        self._shards = dict(shards)
        self._decay_rate, self._clip_threshold = decay_rate, clip_threshold
        self._min_factored = min_factored

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient (collective over the groups of shards)."""
        assert closure is None
        for group in self.param_groups:
            group["step"] += 1
            beta = 1.0 - math.pow(group["step"], -self._decay_rate)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, beta, group["lr"], group["weight_decay"])

    def moments(self, parameter: Tensor) -> tuple[str, ...]:
        """Return the names of a parameter's moments."""
        factored = parameter.dim() >= 2 and min(
            self._length(parameter, axis) for axis in (-1, -2)
        ) >= max(self._min_factored, 2)
        return tuple(FACTOR_AXIS) if factored else ("exp_avg_sq",)

    def state_numel(self, parameter: Tensor) -> int:
        """Return the number of elements of a parameter's moments on this rank."""
        axes = [FACTOR_AXIS.get(name) for name in self.moments(parameter)]
        sizes = [1 if axis is None else parameter.shape[axis] for axis in axes]
        return sum(parameter.numel() // size for size in sizes)

    def _update(self, parameter: Tensor, beta: float, lr: float, decay: float) -> None:
        grad, state = parameter.grad, self.state[parameter]
        assert grad is not None
        square = grad.square().add_(EPSILON_SQUARE)
        for name in self.moments(parameter):
            axis = FACTOR_AXIS.get(name)
            new = square if axis is None else self._mean(square, parameter, axis)
            old = state.get(name)
            state[name] = new.clone() if old is None else old.lerp_(new, 1.0 - beta)
        if "exp_avg_sq" in state:
            update = grad * state["exp_avg_sq"].rsqrt()
        else:
            rows = state["exp_avg_sq_row"]
            row_factor = rows / self._mean(rows, parameter, -2)
            update = grad * row_factor.rsqrt() * state["exp_avg_sq_col"].rsqrt()
        update.div_((self._rms(update, parameter) / self._clip_threshold).clamp_(min=1.0))
        size = self._rms(parameter, parameter).clamp_(min=EPSILON_SCALE)
        if decay:
            parameter.mul_(1.0 - lr * decay)
        parameter.sub_(update.mul_(size.mul_(lr)))

    def _length(self, parameter: Tensor, axis: int) -> int:
        shard = self._shards.get(parameter)
        split = shard is not None and shard.axis == axis
        return parameter.shape[axis] * (shard.group.size() if shard is not None and split else 1)

    def _mean(self, tensor: Tensor, parameter: Tensor, axis: int) -> Tensor:
        """Return the mean over an axis, kept, of ``tensor``, sharded like ``parameter``."""
        total, shard = tensor.sum(axis, keepdim=True), self._shards.get(parameter)
        if shard is not None and shard.axis == axis:
            # All-reduce over the tensor group (experts: their tensor group): each rank holds the
            # sum over its own rows or columns.
            dist.all_reduce(total, group=shard.group)
        return total.div_(self._length(parameter, axis))

    def _rms(self, tensor: Tensor, parameter: Tensor) -> Tensor:
        """Return the root mean square over the last two axes (or the only one)."""
        mean = tensor.square()
        for axis in range(-1, -1 - min(tensor.dim(), 2), -1):
            mean = self._mean(mean, parameter, axis)
        return mean.sqrt_()
