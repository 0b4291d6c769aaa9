"""Normalisations of the local implementation: RMSNorm, LayerNorm, full-width QK-norm.

megatron-core's ``WrappedTorchNorm`` refuses sequence parallelism (transformer/torch_norm.py:28).
Under it every rank normalises its own tokens with the full weight, so that the weight's gradient
is partial: the attribute ``sequence_parallel`` makes ``finalize_model_grads`` all-reduce it over
the tensor group.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup


class _RMSNorm(torch.autograd.Function):
    """Autograd of `rms_norm`. Saves one activation; 1.1 to 3 times F.rms_norm's speed on a CPU."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        epsilon: float,
        group: ProcessGroup | None,
    ) -> torch.Tensor:
        x_fp32 = x.float()
        square = torch.linalg.vector_norm(x_fp32, dim=-1, keepdim=True).square_()
        ctx.group, ctx.width = group, _global_width(x, group)
        # All-reduce over the tensor group if it splits the width: the mean is over all of it.
        inverse_rms = _all_reduce(square, group).div_(ctx.width).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, inverse_rms)
        return (x_fp32 * inverse_rms).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        x, weight, inverse_rms = ctx.saved_tensors
        normed = x.float() * inverse_rms
        grad_fp32 = grad.float()
        product = (grad_fp32 * normed).flatten(0, -2)
        projection = torch.mv(product, weight.float()).view_as(inverse_rms)
        # The same group: every element's gradient depends on the products of the full width.
        projection = _all_reduce(projection, ctx.group).div_(ctx.width)
        grad_x = (grad_fp32 * weight).sub_(normed.mul_(projection)).mul_(inverse_rms)
        return grad_x.to(x.dtype), product.sum(0).to(weight.dtype), None, None


def _global_width(x: torch.Tensor, group: ProcessGroup | None) -> int:
    return x.shape[-1] * (group.size() if group is not None else 1)


def _all_reduce(tensor: torch.Tensor, group: ProcessGroup | None) -> torch.Tensor:
    if group is not None and group.size() > 1:
        torch.distributed.all_reduce(tensor, group=group)
    return tensor


def _has_kernel(x: torch.Tensor, weight: torch.Tensor, group: ProcessGroup | None) -> bool:
    """Return whether torch's own kernel serves: on a GPU, one dtype, a width that is not split.

    It computes in fp32 too. In eager mode on a CPU torch has several operations instead, which are
    slower than ours, as it has on a GPU for a weight of another dtype.
    """
    return x.is_cuda and x.dtype == weight.dtype and (group is None or group.size() == 1)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, group: ProcessGroup | None = None
) -> torch.Tensor:
    """Return ``x / sqrt(mean(x^2) + epsilon) * weight``, computed in fp32, in the dtype of ``x``.

    Args:
        x: [..., width], any float type.
        weight: [width].
        epsilon: added to the mean square.
        group: ranks that hold equal shards of the last dimension; the mean runs over all of them.
            Forward and backward each all-reduce one number per token.
    """
    if _has_kernel(x, weight, group):
        return F.rms_norm(x, weight.shape, weight, epsilon)
    result: torch.Tensor = _RMSNorm.apply(x, weight, epsilon, group)
    return result


def _is_affine(config: TransformerConfig) -> bool:
    """Return whether norms have weights: a setting that megatron-core lacks."""
    return getattr(config, "norm_affine", True)


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019), built from a layer spec.

    ``norm_affine``: whether it has a weight (ST-MoE's trial, arXiv 2202.08906, table 4: none).
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        assert not config.layernorm_zero_centered_gamma
        self.eps = eps
        ones = torch.ones(hidden_size, dtype=config.params_dtype)
        if not _is_affine(config):
            self.register_buffer("weight", ones, persistent=False)
            return
        self.weight = torch.nn.Parameter(ones)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise [..., hidden]."""
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(torch.nn.LayerNorm):
    """torch's LayerNorm, built from a layer spec."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps, _is_affine(config), dtype=config.params_dtype)
        assert not config.layernorm_zero_centered_gamma
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class FullWidthRMSNorm(torch.nn.Module):
    """RMSNorm over a full query or key projection whose heads are split over tensor ranks.

    OLMoE's QK-norm (arXiv 2409.02060, Table 10): before the split into heads and before the
    rotary embedding. Weight [heads x head width], sharded like the heads.

    Args:
        config: megatron-core's.
        hidden_size: width of one head (as megatron-core passes it to a QK-norm).
        heads: heads of the full projection: query heads, or key/value heads.
        tp_group: the tensor group.

    Raises:
        ValueError: the ranks do not divide the heads.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float,
        heads: int,
        tp_group: ProcessGroup,
    ) -> None:
        super().__init__()
        ranks = tp_group.size()
        if heads % ranks:
            raise ValueError(
                f"full-width QK-norm: {ranks} tensor ranks do not divide {heads} heads"
            )
        self.eps = eps
        self.tp_group = tp_group
        width = heads // ranks * hidden_size
        self.weight = torch.nn.Parameter(torch.ones(width, dtype=config.params_dtype))
        # With these attributes the gradient norm counts the shard of every rank.
        self.weight.tensor_model_parallel = True  # type: ignore[attr-defined]
        self.weight.partition_dim = 0  # type: ignore[attr-defined]
        self.weight.partition_stride = 1  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise [s, b, local heads, head width]."""
        return rms_norm(x.flatten(-2), self.weight, self.eps, self.tp_group).view(x.shape)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return one global tensor [heads x head width], sharded over tensor ranks on axis 0."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        return sharded
