"""DeepSeek's multi-head latent attention on tensor ranks, without Transformer Engine."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.multi_latent_attention import (
    MLASelfAttention,
    MLASelfAttentionSubmodules,
)
from megatron.core.transformer.transformer_config import MLATransformerConfig

from moetron.moe.layers.fp8_linear import fp8_linear
from moetron.moe.numerics.fp8_emulation import Fp8Numerics
from moetron.moe.numerics.scaled_matmul import fp8_product
from moetron.moe.overlap.delayed_gradients import DelayedGradients
from moetron.moe.overlap.delayed_linear import delayed_product


class ReplicatedLinear(DelayedGradients, torch.nn.Module):
    """Linear layer x W^T, W [outputs, inputs] replicated on tensor ranks with different tokens.

    Under sequence parallelism the gradient of W is partial; the attribute ``sequence_parallel``
    makes ``finalize_model_grads`` all-reduce it over the tensor group.

    Args:
        config: initialisation and dtype.
        inputs: width of x.
        outputs: width of the result.
        numerics: of an FP8 product; None: no FP8.
    """

    def __init__(
        self, config: MLATransformerConfig, inputs: int, outputs: int, numerics: Fp8Numerics | None
    ) -> None:
        super().__init__()
        device = torch.cuda.current_device()
        weight = torch.empty(outputs, inputs, dtype=config.params_dtype, device=device)
        self.weight = torch.nn.Parameter(weight)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        if config.perform_initialization:
            config.init_method(self.weight)
        self._delays = config.delay_wgrad_compute
        if self._delays:
            self.delay(self.weight)
        self._fp8 = None if numerics is None else fp8_product(numerics, outputs, inputs)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Map [s, b, inputs] to [s, b, outputs]; no bias."""
        if self._delays:
            return delayed_product(self, x, self.weight), None
        if self._fp8 is None:
            return F.linear(x, self.weight), None
        return fp8_linear(self._fp8, x, self.weight), None


class LatentAttention(MLASelfAttention):
    """megatron-core's latent attention with a correct gradient under tensor parallelism.

    All heads of a token share one rotated key. megatron-core 0.16.1 without Transformer Engine
    splits the projection that computes it over tensor ranks and gathers the result
    (multi_latent_attention.py:628), so that its gradient holds only one rank's heads. Here, as in
    Transformer Engine's path, every rank computes the compressed vectors of its part of the
    sequence, and megatron-core all-gathers the sequence over the tensor group; the reduce-scatter
    in the backward pass sums the heads' gradients. Several tensor ranks need sequence parallelism.

    Args:
        config: megatron-core's.
        submodules: ``linear_*_down_proj`` are not read.
        args: of ``MLASelfAttention``, as are ``kwargs``.
        numerics: of FP8 down projections; None: no FP8.
    """

    def _resolve_qk_norm_config(self, submodules: MLASelfAttentionSubmodules) -> dict[str, Any]:
        """Return the spec's modules; megatron-core 0.19 would choose from its own back ends."""
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj")
        norms = ("q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) for name in (*names, *norms)}

    def __init__(
        self,
        config: MLATransformerConfig,
        submodules: MLASelfAttentionSubmodules,
        *args: Any,
        numerics: Fp8Numerics | None = None,
        **kwargs: Any,
    ) -> None:
        accepted = {f"linear_{name}_down_proj": ColumnParallelLinear for name in ("q", "kv")}
        super().__init__(config, replace(submodules, **accepted), *args, **kwargs)
        assert config.sequence_parallel or self.pg_collection.tp.size() == 1
        width = config.hidden_size
        if config.q_lora_rank is not None:
            self.linear_q_down_proj = ReplicatedLinear(config, width, config.q_lora_rank, numerics)
        cached = config.kv_lora_rank + config.qk_pos_emb_head_dim
        self.linear_kv_down_proj = ReplicatedLinear(config, width, cached, numerics)
