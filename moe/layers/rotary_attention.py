"""Self-attention whose rotary embedding is one kernel on a GPU."""

from typing import Any

import torch
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
    _yarn_get_concentration_factor_from_config,
)
from megatron.core.transformer.attention import SelfAttention

from moetron.moe.kernels.availability import uses_triton
from moetron.moe.kernels.rotary import PairLayout, rotary


class RotarySelfAttention(SelfAttention):
    """megatron-core's self-attention; rotates queries and keys with our kernel where it serves.

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
            and all(
                options.get(name) is None
                for name in ("inference_context", "inference_params", "packed_seq_params")
            )
        )

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        """Return query, key and value [s, b, heads, width]; query and key normed, then rotated."""
        query, key, *others = super().get_query_key_value_tensors(*args, **kwargs)
        if self._angles is not None:
            interleaved = self.config.rotary_interleaved
            layout = PairLayout(interleaved, interleaved)
            scale = _yarn_get_concentration_factor_from_config(self.config)
            query, key = (rotary(x, self._angles, layout, scale) for x in (query, key))
        return query, key, *others
