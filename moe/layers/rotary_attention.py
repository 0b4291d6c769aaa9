"""Self-attention whose queries and keys come from one kernel on a GPU."""

from typing import Any

import torch
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
    _yarn_get_concentration_factor_from_config,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp

from moetron.moe.kernels.availability import uses_triton
from moetron.moe.kernels.query_key import HeadLayout, query_key
from moetron.moe.kernels.rotary import PairLayout, rotary, rotation_table
from moetron.moe.layers.norm import FullWidthRMSNorm, RMSNorm


class RotarySelfAttention(SelfAttention):
    """megatron-core's self-attention; norms and rotates queries and keys with our kernels.

    megatron-core's own fusion (``apply_rope_fusion``) needs Transformer Engine, and its unfused
    embedding reads and writes queries and keys about eight times. Packed sequences, caches and
    layers without positions remain megatron-core's.
    """

    _angles: torch.Tensor | None = None

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        rotary_pos_emb: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run ``SelfAttention``'s ``forward``, but rotate in `get_query_key_value_tensors`."""
        self._angles = None
        if self._has_kernel(hidden_states, rotary_pos_emb, kwargs):
            self._angles, rotary_pos_emb = rotary_pos_emb, None
        output: tuple[torch.Tensor, torch.Tensor | None] = super().forward(
            hidden_states, attention_mask, *args, rotary_pos_emb=rotary_pos_emb, **kwargs
        )
        return output

    def _has_kernel(self, x: torch.Tensor, angles: Any, options: dict[str, Any]) -> bool:
        return (
            isinstance(angles, torch.Tensor)
            and angles.shape[1:3] == (1, 1)  # one angle for all samples of the batch
            and uses_triton(x)
            and not self.config.apply_rope_fusion
            and not self.config.no_rope_freq
            and not self.config.attention_output_gate
            and all(
                options.get(name) is None
                for name in ("inference_context", "inference_params", "packed_seq_params")
            )
        )

    def get_query_key_value_tensors(
        self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Return query, key and value [s, b, heads, width]; query and key normed, then rotated."""
        angles, interleaved = self._angles, self.config.rotary_interleaved
        if angles is None:
            return super().get_query_key_value_tensors(hidden_states, *args, **kwargs)
        scale = _yarn_get_concentration_factor_from_config(self.config)
        if self._norm_has_kernel() and self.config.num_query_groups >= self.world_size:
            mixed, _ = self.linear_qkv(hidden_states)
            mixed = mixed.view(*mixed.shape[:2], self.num_query_groups_per_partition, -1)
            normed = isinstance(self.q_layernorm, (FullWidthRMSNorm, RMSNorm))
            query_weight = self.q_layernorm.weight if normed else None
            key_weight = self.k_layernorm.weight if normed else None
            layout = HeadLayout(
                width=self.hidden_size_per_attention_head,
                interleaved=interleaved,
                normed=normed,
                full_width=isinstance(self.q_layernorm, FullWidthRMSNorm),
                epsilon=self.config.layernorm_epsilon,
            )
            table = rotation_table(angles, scale)
            return query_key(mixed, query_weight, key_weight, table, layout)
        query, key, value = super().get_query_key_value_tensors(hidden_states, *args, **kwargs)
        pairs = PairLayout(interleaved, interleaved)
        query, key = (rotary(x, angles, pairs, scale) for x in (query, key))
        return query, key, value

    def _norm_has_kernel(self) -> bool:
        """Return whether one kernel serves: no norm of another kind, no width split over ranks."""
        norm = self.q_layernorm
        whole = isinstance(norm, FullWidthRMSNorm) and norm.tp_group.size() == 1
        return whole or norm is None or isinstance(norm, (IdentityOp, RMSNorm))
