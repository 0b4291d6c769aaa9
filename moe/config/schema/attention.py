"""Attention beyond heads and widths: latent attention, rotary scaling, biases, scale."""

from typing import Literal

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from moetron.moe.config.schema.field import Group
from moetron.moe.config.schema.roles import Function, Shape


class AttentionSettings(Group):
    """Attention beyond heads and widths: latent attention, rotary scaling, biases, scale."""

    add_qkv_bias: Shape[bool] = False
    """Biases in the query, key and value projections alone (Qwen1.5, Qwen2)."""
    softmax_scale: Function[PositiveFloat | None] = None
    """Multiplies attention logits (OpenMoE: 1); unset: 1 / sqrt(width of a head)."""
    rope_type: Function[Literal["rope", "llama3", "yarn"]] = "rope"
    """Rotary frequencies: plain; Llama 3.1's scaling for longer sequences; YaRN
    (arXiv 2309.00071)."""
    rotary_scaling_factor: Function[PositiveFloat] = 1.0
    """How much longer sequences are than those of the first training (llama3, yarn)."""
    original_max_position_embeddings: Function[PositiveInt] = 4096
    """Sequence length of the first training (yarn)."""
    beta_fast: Function[PositiveFloat] = 32.0
    """YaRN: channels that turn more often than this over the first length stay as they are."""
    beta_slow: Function[PositiveFloat] = 1.0
    """YaRN: channels that turn less often than this are slowed by the whole factor."""
    mscale: Function[NonNegativeFloat] = 1.0
    """YaRN: growth of the rotated channels, 1 + 0.1 mscale ln(factor), divided by the same of
    --mscale-all-dim."""
    mscale_all_dim: Function[NonNegativeFloat] = 0.0
    """YaRN: growth of all logits of latent attention, (1 + 0.1 mscale_all_dim ln(factor))^2."""
    multi_latent_attention: Shape[bool] = False
    """DeepSeek's latent attention (arXiv 2405.04434, section 2.1): keys and values from one
    compressed vector a token. --qk-layernorm normalises the compressed vectors."""
    q_lora_rank: Shape[PositiveInt | None] = None
    """Latent attention: width of the compressed queries; unset: queries are not compressed."""
    kv_lora_rank: Shape[PositiveInt] = 512
    """Latent attention: width of the compressed keys and values."""
    qk_head_dim: Shape[PositiveInt] = 128
    """Latent attention: channels of a query or key head that are not rotated."""
    qk_pos_emb_head_dim: Shape[PositiveInt] = 64
    """Latent attention: rotated channels, whose key all heads share."""
    v_head_dim: Shape[PositiveInt] = 128
    """Latent attention: channels of a value head."""
