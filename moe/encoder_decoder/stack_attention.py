"""Core attention with relative biases, within the examples of a sample.

Shape suffixes: A heads on this rank, N examples of equal lengths, Q queries and K keys of one.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType

from moetron.moe.encoder_decoder.segments import Pairs
from moetron.moe.layers.attention import SdpaAttention


class StackAttention(SdpaAttention):
    """`SdpaAttention` with biases, which hold the decoder's causal mask too.

    Samples of several examples never have an [S, S] mask: each example attends by itself, examples
    of equal lengths together, and padding has output 0. The biases are those of the longest
    example.
    """

    def forward(  # type: ignore[override]
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: list[Pairs] | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Return the attention output [sq, b, heads x width] of this rank's heads.

        Args:
            query: [sq, b, A, width].
            key: [sk, b, A, width].
            value: like ``key``.
            attention_mask: which queries see which keys, in place of a tensor; None: all of their
                sample.
            attn_mask_type: ignored: biases hold the causal mask.
            attention_bias: [A, at least Q, at least K]; None in cross-attention.
            packed_seq_params: not supported.
        """
        assert packed_seq_params is None
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, A, s, width]
        if attention_mask is None:
            return self._among(q, k, v, attention_bias, False).permute(2, 0, 1, 3).flatten(2)
        queries, keys = zip(*[(p.query_NQ, p.key_NK) for p in attention_mask], strict=True)
        # One gather each: the gradient of every piece of its own would have the full size.
        own = (_pieces(x, rows) for x, rows in ((q, queries), (k, keys), (v, keys)))
        parts = [
            self._among(own_q, own_k, own_v, attention_bias, True)
            for own_q, own_k, own_v in zip(*own, strict=True)
        ]
        rows = torch.cat([each.flatten() for each in queries])
        found = torch.cat([part.transpose(1, 2).flatten(0, 1).flatten(1) for part in parts])
        sq, b = query.shape[:2]
        context = found.new_zeros(b * sq, found.shape[1]).index_copy(0, rows, found)
        return context.view(b, sq, -1).transpose(0, 1)

    def _among(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bias: torch.Tensor | None,
        shapes_vary: bool,
    ) -> torch.Tensor:
        """Return the attention [N, A, Q, width] of all queries to all keys of their example."""
        if bias is not None:
            bias = bias[:, : q.shape[2], : k.shape[2]].to(q.dtype)
        with self._dropout_rng(), self._kernels(q, shapes_vary):
            return F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=bias,
                dropout_p=self.dropout if self.training else 0.0,
                scale=self.softmax_scale,
            )


def _pieces(x: torch.Tensor, rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the ``rows`` [N, s] of b x s of x [b, A, s, width], each [N, A, s, width]."""
    flat = x.transpose(1, 2).flatten(0, 1).index_select(0, torch.cat([r.flatten() for r in rows]))
    parts = flat.split([each.numel() for each in rows])
    return [
        part.unflatten(0, each.shape).transpose(1, 2)
        for part, each in zip(parts, rows, strict=True)
    ]
