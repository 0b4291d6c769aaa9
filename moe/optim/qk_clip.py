"""Largest attention logits, and QK-clip (MuonClip, arXiv 2507.20534, section 2.1).

After an update, query and key weights of a head whose largest logit S_max in the step was above tau
are scaled so that its logits become gamma = tau / S_max of themselves: queries by gamma^alpha, keys
by gamma^(1 - alpha). Heads that share a key are scaled together, by the largest of their logits, as
in megatron-core. In latent attention all heads share the rotated key, so the rotated part of a
query takes all of gamma.

Shape suffixes: s positions of queries, S of keys, b samples, H heads of this rank, G key heads,
r = H / G, R rows of a weight.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.multi_latent_attention import MLASelfAttention

BLOCK = 128
"""Queries whose logits are in memory at a time."""


@torch.no_grad()
def largest_logits(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    allowed: torch.Tensor | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """Return each head's largest logit, scale x q k^T over allowed pairs: float32 [H].

    Args:
        query: [s, b, H, width].
        key: [S, b, G, width].
        scale: of the logits.
        allowed: bool, broadcast to [b, 1, s, S]; None: all pairs, or see ``causal``.
        causal: queries are the last s positions, and see keys up to their own.
    """
    s, b, heads, width = query.shape
    before = len(key) - s
    groups = key.shape[2]
    query_bGrs = query.view(s, b, groups, heads // groups, width).permute(1, 2, 3, 0, 4)
    key_bGS = key.permute(1, 2, 3, 0).unsqueeze(2)  # [b, G, 1, width, S]
    found = []
    for first in range(0, s, BLOCK):
        last = min(first + BLOCK, s)
        seen = before + last if causal else len(key)
        logits = query_bGrs[..., first:last, :] @ key_bGS[..., :seen]
        if causal:
            ahead = torch.ones(last - first, seen, dtype=torch.bool, device=key.device)
            logits = logits.masked_fill_(ahead.triu(before + first + 1), -torch.inf)
        elif allowed is not None:
            part = allowed[..., first:last, :]
            part = part.unsqueeze(2) if part.dim() == 4 else part
            logits = logits.masked_fill_(~part, -torch.inf)
        found.append(logits.amax((0, 3, 4)).flatten())
    return torch.stack(found).amax(0).float() * scale


def clip_factors(largest: torch.Tensor, threshold: float) -> torch.Tensor:
    """Return gamma = min(1, threshold / largest logit); 1 where that is negative."""
    return torch.where(largest > threshold, threshold / largest, 1.0)


def row_factors(parts: Sequence[tuple[torch.Tensor, int]]) -> torch.Tensor:
    """Return the factor of each row of a projection: [R].

    Args:
        parts: of a head (or group of heads), in the order of its rows: factor by head, [H], and
            number of rows.
    """
    return torch.cat([each_H[:, None].expand(-1, rows) for each_H, rows in parts], dim=1).flatten()


class AttentionLogits:
    """The largest logits of a step on this rank, which core attention keeps, and the clip.

    Args:
        chunks: the model on this rank.
        groups: ``dp_cp`` is read.
        threshold: tau.
        alpha: exponent of the queries' part.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        groups: ProcessGroupCollection,
        threshold: float,
        alpha: float,
    ) -> None:
        self._attentions = [
            module
            for chunk in chunks
            for module in chunk.modules()
            if isinstance(module, SelfAttention | MLASelfAttention)
        ]
        self._group = groups.dp_cp
        self._threshold, self._alpha = threshold, alpha

    def reset(self) -> None:
        """Begin a step."""
        for attention in self._attentions:
            attention.core_attention.current_max_attn_logits = None

    def largest(self) -> torch.Tensor:
        """Return the largest logit of all heads on this rank: float64 scalar on the device."""
        return self._stacked().max().double()

    def factors(self) -> dict[torch.nn.Parameter, torch.Tensor]:
        """Return the factor of every row, fp32 [R], of the parameters to clip.

        Collective over DP x CP; nothing waits for the device.
        """
        largest_LH = self._stacked()
        # All-reduce over DP x CP: these ranks hold replicas of the heads and see other tokens.
        # Tensor ranks hold other heads, pipeline stages other layers.
        dist.all_reduce(largest_LH, op=dist.ReduceOp.MAX, group=self._group)
        found: dict[torch.nn.Parameter, torch.Tensor] = {}
        for attention, largest_H in zip(self._attentions, largest_LH, strict=True):
            if isinstance(attention, MLASelfAttention):
                found |= self._latent(attention, largest_H)
            else:
                found |= self._grouped(attention, largest_H)
        return found

    def _stacked(self) -> torch.Tensor:
        kept = [each.core_attention.current_max_attn_logits for each in self._attentions]
        return torch.stack(kept).float()

    def _grouped(
        self, attention: SelfAttention, largest_H: torch.Tensor
    ) -> Mapping[torch.nn.Parameter, torch.Tensor]:
        groups, width = attention.num_query_groups_per_partition, attention.key_hidden_size
        largest_Gr = largest_H.view(groups, -1)
        gamma_G = clip_factors(largest_Gr.amax(1), self._threshold)
        queries = gamma_G**self._alpha, largest_Gr.shape[1] * width
        keys, values = (gamma_G ** (1 - self._alpha), width), (torch.ones_like(gamma_G), width)
        rows = row_factors([queries, keys, values])
        joint = attention.linear_qkv
        # Part of queries and keys; Transformer Engine's layers without biases have an empty one.
        biases = () if joint.bias is None or not joint.bias.numel() else (joint.bias,)
        return dict.fromkeys((joint.weight, *biases), rows)

    def _latent(
        self, attention: MLASelfAttention, largest_H: torch.Tensor
    ) -> Mapping[torch.nn.Parameter, torch.Tensor]:
        config = attention.config
        plain, rotated, value = config.qk_head_dim, config.qk_pos_emb_head_dim, config.v_head_dim
        gamma_H = clip_factors(largest_H, self._threshold)
        queries = row_factors([(gamma_H**self._alpha, plain), (gamma_H, rotated)])
        keys = row_factors(
            [(gamma_H ** (1 - self._alpha), plain), (torch.ones_like(gamma_H), value)]
        )
        compressed = config.q_lora_rank is not None
        projection = attention.linear_q_up_proj if compressed else attention.linear_q_proj
        return {projection.weight: queries, attention.linear_kv_up_proj.weight: keys}
