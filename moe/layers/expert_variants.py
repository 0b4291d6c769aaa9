"""Variants of grouped experts used by OpenMoE and ST-MoE."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import (
    get_cuda_rng_tracker,
    get_expert_parallel_rng_tracker_name,
)

from moetron.moe.config.bridge import ModelConfig
from moetron.moe.kernels.expert_rows import ExpertRows
from moetron.moe.layers.experts import GroupedExperts, Layer, sharded_tensor


class _Gather(torch.autograd.Function):
    """Differentiable ``gather`` of rows."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rows: ExpertRows) -> torch.Tensor:
        ctx.rows = rows
        return rows.gather(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.rows.combine(grad.contiguous()), None


class _Combine(torch.autograd.Function):
    """Differentiable ``combine``; grouped_mm also needs its contiguous gradient."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, rows: ExpertRows) -> torch.Tensor:
        ctx.rows = rows
        return rows.combine(y)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.rows.gather(grad.contiguous()), None


class _Weights(torch.autograd.Function):
    """Differentiable ``weights`` of rows."""

    @staticmethod
    def forward(ctx: Any, probs: torch.Tensor, rows: ExpertRows) -> torch.Tensor:
        ctx.rows = rows
        return rows.weights(probs)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.rows.weight_gradient(grad.contiguous()), None


class SeparateExperts(GroupedExperts):
    """Grouped experts whose operations autograd differentiates one by one.

    Subclasses may replace `product` and `inner`. On a GPU the host waits for the number of rows.
    Weight gradients cannot wait (--delay-wgrad-compute).
    """

    def run(self, x: torch.Tensor, probs: torch.Tensor, rows: ExpertRows) -> torch.Tensor:
        """Return the output of ``forward``."""
        assert self._waiting is None  # a rule of --delay-wgrad-compute
        rows = rows.trimmed()
        hidden = self.product("fc1", _Gather.apply(x, rows), self.weight1, rows)
        weight_R = _Weights.apply(probs, rows)
        activated = (self.inner(hidden, rows) * weight_R.unsqueeze(-1)).to(hidden.dtype)
        out: torch.Tensor = _Combine.apply(self.product("fc2", activated, self.weight2, rows), rows)
        return out

    def product(
        self, layer: Layer, x: torch.Tensor, weight: torch.Tensor, rows: ExpertRows
    ) -> torch.Tensor:
        """Multiply each expert's rows by its transposed weight; differentiable."""
        return self.multiply(layer, x, weight, rows)

    def inner(self, hidden: torch.Tensor, rows: ExpertRows) -> torch.Tensor:
        """Return the input of the second layer, before the token's weight: [R, F]."""
        return self.activation.inner(hidden)


class VariantExperts(SeparateExperts):
    """Grouped experts with any of the following options.

    - ``double_gated``: down((silu(gate x) * up x) * linear x), OpenMoE's unit; ``weight1``
      [E, 3F, H] holds gate, up and linear.
    - ``moe_expert_multiplicative_bias``: the inner activation [F] times ``inner_scale`` [E, F],
      initialised to ones (ST-MoE, arXiv 2202.08906, appendix C).
    - ``moe_expert_dropout``: dropout of the inner activation (the same, section 4); ranks draw
      their own random numbers.

    Args:
        num_local_experts: experts on this rank.
        config: see `grouped_gemm_fits`.
        submodules: ignored.
        pg_collection: as in `GroupedExperts`.
        name: ignored.
    """

    config: ModelConfig

    def __init__(
        self,
        num_local_experts: int,
        config: ModelConfig,
        submodules: Any = None,
        pg_collection: ProcessGroupCollection | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(num_local_experts, config, submodules, pg_collection)
        if config.moe_expert_multiplicative_bias:
            ffn = self.weight2.shape[2]
            scale = torch.ones_like(self.weight2[:, 0]).view(num_local_experts, ffn)
            self.inner_scale = torch.nn.Parameter(scale)
            set_tensor_model_parallel_attributes(self.inner_scale, True, 1, 1)
            like_dense = self.weight2.allreduce  # type: ignore[attr-defined]
            self.inner_scale.allreduce = like_dense  # type: ignore[attr-defined]

    @staticmethod
    def fc1_parts(config: ModelConfig) -> int:
        """Return the number of matrices [F, H] per expert in ``weight1``."""
        return 3 if config.double_gated else GroupedExperts.fc1_parts(config)

    def inner(self, hidden: torch.Tensor, rows: ExpertRows) -> torch.Tensor:
        """Return the input of the second layer, before the token's weight: [R, F]."""
        if self.config.double_gated:
            gate, up, linear = hidden.chunk(3, dim=-1)
            inner = self.config.activation_func(gate) * up * linear
        else:
            inner = super().inner(hidden, rows)
        if self.config.moe_expert_multiplicative_bias:
            scale = self.inner_scale.repeat_interleave(
                rows.counts_E, dim=0, output_size=len(hidden)
            )
            inner = inner * scale
        if self.config.moe_expert_dropout and self.training:
            with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
                inner = F.dropout(inner, self.config.moe_expert_dropout)
        return inner

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return the entries of `GroupedExperts` and ``inner_scale`` [experts, F]."""
        entries = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.config.moe_expert_multiplicative_bias:
            axis, tensor_ranks = len(sharded_offsets), (self.tp_group.rank(), self.tp_group.size())
            entries[f"{prefix}inner_scale"] = sharded_tensor(
                f"{prefix}experts.inner_scale",
                self.inner_scale,
                (axis + 1, *tensor_ranks),
                (0, 0, self.dp_group.rank()),
                (*sharded_offsets, (axis, self.ep_group.rank(), self.ep_group.size())),
                axis,
            )
        return entries
