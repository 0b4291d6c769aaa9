"""Core attention on ``torch.nn.functional.scaled_dot_product_attention``.

Shape suffixes: B samples of a micro-batch, S positions of a sequence.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.distributed import ProcessGroup
from torch.nn.attention import sdpa_kernel

from moetron.moe.host.context_parallel import chunks_of_rank, gather_sequence
from moetron.moe.layers.attention_kernels import WITHOUT_CUDNN, causal_mask, prefer, preferred
from moetron.moe.layers.document_attention import (
    attend_in_documents,
    attend_with_kernel,
    varlen_kernel,
)
from moetron.moe.optim.qk_clip import largest_logits


def prefix_mask(prefix_B: torch.Tensor, length: int) -> torch.Tensor:
    """Return the mask of causal attention with a bidirectional prefix: bool [b, 1, s, s].

    True marks forbidden pairs.

    Args:
        prefix_B: length of each sample's bidirectional prefix, int64 [b].
        length: of the samples (s).
    """
    place_S = torch.arange(length, device=prefix_B.device)
    ahead_SS = place_S[None, :] > place_S[:, None]
    outside_BS = place_S >= prefix_B[:, None]
    return (ahead_SS & outside_BS[:, None, :])[:, None]


def shorten_prefix(mask_B1SS: torch.Tensor, ahead: int) -> torch.Tensor:
    """Return the mask of `prefix_mask` for prefixes that are ``ahead`` tokens shorter.

    Position i of the n-th module of multi-token prediction also holds token i + n. Positions with
    bidirectional attention must not hold tokens after the prefix, which the module predicts.
    """
    shorter = torch.ones_like(mask_B1SS).triu(1)
    shorter[..., :-ahead] &= mask_B1SS[..., ahead:]
    return shorter


def repeat_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Repeat each key or value head [s, b, groups, width] for the query heads that share it."""
    s, b, groups, width = x.shape
    return x.unsqueeze(3).expand(s, b, groups, heads // groups, width).reshape(s, b, heads, width)


class SdpaAttention(MegatronModule):
    """Attention, softmax(scale x q k^T + mask) v, without the s x s matrix in memory.

    Replaces megatron-core's ``DotProductAttention``: same constructor, same ``forward``.

    Args:
        config: megatron-core's.
        layer_number: 1-based; only with ``apply_query_key_layer_scaling``.
        attn_mask_type: mask to apply when ``forward`` gets none.
        attention_type: "self" or "cross"; ignored.
        attention_dropout: dropout of the probabilities; unset: the configuration's.
        softmax_scale: unset: 1 / sqrt(head width).
        cp_comm_type: ignored: keys and values are gathered.
        k_channels: ignored, as is ``v_channels``: widths come from the tensors.
        pg_collection: ``cp`` is read, with context parallelism.

    Raises:
        ValueError: the configuration has a sliding window or an attention sink, which only
            Transformer Engine and ``DotProductAttention`` implement.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
    ) -> None:
        super().__init__(config=config)
        if config.window_size is not None or config.softmax_type != "vanilla":
            raise ValueError("scaled_dot_product_attention has no sliding window and no sink")
        self.cp_group: ProcessGroup | None = None
        if config.context_parallel_size > 1:
            assert pg_collection is not None
            self.cp_group = pg_collection.cp
        if torch.cuda.is_available():
            prefer(preferred())
        self.attn_mask_type = attn_mask_type
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self._keeps_logits = config.qk_clip or config.log_max_attention_logit
        self.current_max_attn_logits: torch.Tensor | None = None
        """Largest logit of each head since the last reset, fp32 [heads]; see qk_clip.py."""
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Return the attention output of this rank's heads.

        With context parallelism arguments and result hold this rank's chunks of the sequence
        (host/context_parallel.py).

        Args:
            query: [sq, b, heads, width].
            key: [sk, b, key/value heads, width].
            value: like ``key``, of any width.
            attention_mask: bool, broadcast to [b, heads, sq, sk], True where attention is
                forbidden; it replaces the causal mask and is not supported with context
                parallelism. Or ``cu_seqlens``, int32 [documents + 1]: causal inside the documents
                that it cuts the full sequences into (document_attention.py). A tensor and not
                ``packed_seq_params``, so that it passes through recomputation, and micro-batches
                keep their shape. None: see ``attn_mask_type``.
            attn_mask_type: unset: the constructor's.
            attention_bias: not supported.
            packed_seq_params: not supported.

        Returns:
            [sq, b, heads x width of a value].
        """
        assert packed_seq_params is None and attention_bias is None
        if attention_mask is not None and attention_mask.dtype == torch.int32:
            return self._attend_in_documents(query, key, value, attention_mask)
        mask_type = attn_mask_type or self.attn_mask_type
        if self.cp_group is not None:
            assert attention_mask is None, "a mask with context parallelism"
            return self._attend_across(query, key, value, mask_type, self.cp_group)
        sq, sk = query.shape[0], key.shape[0]
        # A single query is the newest position of a cached sequence and sees all of it.
        causal = attention_mask is None and mask_type == AttnMaskType.causal and sq > 1
        assert not causal or sq == sk, "a causal mask is for self-attention"
        allowed = None if attention_mask is None else ~attention_mask
        return self._attend(query, key, value, allowed, causal)

    def _attend_across(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask_type: AttnMaskType,
        group: ProcessGroup,
    ) -> torch.Tensor:
        """Attend from this context rank's queries to the full sequence, causally if the mask is."""
        keys, values = self._gather(key, value, group)
        if mask_type != AttnMaskType.causal:
            return self._attend(query, keys, values)
        size = query.shape[0] // 2
        parts = []
        for chunk, queries in zip(
            chunks_of_rank(group.rank(), group.size()), query.split(size), strict=True
        ):
            seen = (chunk + 1) * size
            parts.append(self._attend(queries, keys[:seen], values[:seen], causal=True))
        return torch.cat(parts)

    @staticmethod
    def _gather(
        key: torch.Tensor, value: torch.Tensor, group: ProcessGroup
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values of the full sequence."""
        widths = [key.shape[-1], value.shape[-1]]
        # All-gather over the context group: each rank holds the keys and values of its own chunks,
        # and its queries need those of all earlier positions. Backward is a reduce-scatter.
        keys, values = gather_sequence(torch.cat([key, value], dim=-1), group).split(widths, -1)
        return keys, values

    def _attend_in_documents(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seqlens: torch.Tensor,
    ) -> torch.Tensor:
        """Attend causally inside documents, from all of the sequence or from this rank's chunks."""
        length, group = len(query), self.cp_group
        attend = partial(self._attend, shapes_vary=True)
        if group is not None:
            key, value = self._gather(key, value, group)
            size = length // 2
            chunks = chunks_of_rank(group.rank(), group.size())
            ranges = [(chunk * size, (chunk + 1) * size) for chunk in chunks]
            return attend_in_documents(attend, query, key, value, cu_seqlens, ranges)
        kernel = varlen_kernel(query, value)
        if kernel is not None and not (self.training and (self.dropout or self._keeps_logits)):
            key, value = (repeat_heads(x, query.shape[2]) for x in (key, value))
            return attend_with_kernel(kernel, query, key, value, cu_seqlens, self.softmax_scale)
        return attend_in_documents(attend, query, key, value, cu_seqlens, [(0, length)])

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        allowed: torch.Tensor | None = None,
        causal: bool = False,
        shapes_vary: bool = False,
    ) -> torch.Tensor:
        """Return the output; ``causal``: queries are the last positions of the keys."""
        if self._keeps_logits and self.training:
            found = largest_logits(query, key, self.softmax_scale, allowed, causal)
            before = self.current_max_attn_logits
            self.current_max_attn_logits = found if before is None else found.maximum(before)
        if causal and len(query) < len(key):
            allowed, causal = causal_mask(len(query), len(key), query.device), False
        shares_keys = query.shape[2] != key.shape[2]
        if query.is_cuda and shares_keys:
            # Not every kernel shares a key among queries; those that do not leave it to math.
            key, value = (repeat_heads(x, query.shape[2]) for x in (key, value))
            shares_keys = False
        with self._dropout_rng(), self._kernels(query, shapes_vary):
            context = F.scaled_dot_product_attention(
                query.permute(1, 2, 0, 3),
                key.permute(1, 2, 0, 3),
                value.permute(1, 2, 0, 3),
                attn_mask=allowed,
                dropout_p=self.dropout if self.training else 0.0,
                is_causal=causal,
                scale=self.softmax_scale,
                enable_gqa=shares_keys,
            )  # [b, heads, sq, width]
        return context.permute(2, 0, 1, 3).flatten(2)

    def _kernels(self, query: torch.Tensor, shapes_vary: bool) -> AbstractContextManager[object]:
        """Return the context of a call's kernels.

        Shapes vary with documents, and outside training, as the length of a text that is generated.
        """
        if not query.is_cuda or (self.training and not shapes_vary):
            return nullcontext()
        return sdpa_kernel(WITHOUT_CUDNN)

    def _dropout_rng(self) -> AbstractContextManager[None]:
        """Return the generator context that gives tensor ranks different dropout masks.

        They hold different heads of the same tokens.
        """
        if self.config.sequence_parallel or not (self.dropout and self.training):
            return nullcontext()
        fork: AbstractContextManager[None] = tensor_parallel.get_cuda_rng_tracker().fork()
        return fork
