"""Attention settings beyond heads and widths."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from moetron.moe.config.schema.field import Group
from moetron.moe.config.schema.roles import Function, Run, Shape, Training


class AttentionSettings(Group):
    """Attention beyond heads and widths: latent attention, rotary scaling, biases, scale."""

    add_qkv_bias: Shape[bool] = False
    """Use biases in the query, key and value projections only (Qwen1.5, Qwen2)."""
    softmax_scale: Function[PositiveFloat | None] = None
    """Scale of attention logits (OpenMoE: 1); unset: 1 / sqrt(head width)."""
    rope_type: Function[Literal["rope", "llama3", "yarn"]] = "rope"
    """Rotary frequencies: plain (rope), Llama 3.1's scaling for longer sequences (llama3) or YaRN
    (arXiv 2309.00071)."""
    rotary_scaling_factor: Function[PositiveFloat] = 1.0
    """Sequence length divided by the original training length (llama3, yarn)."""
    original_max_position_embeddings: Function[PositiveInt] = 4096
    """Original training sequence length (yarn)."""
    beta_fast: Function[PositiveFloat] = 32.0
    """YaRN: channels with more rotations than this over the original length are unchanged."""
    beta_slow: Function[PositiveFloat] = 1.0
    """YaRN: channels with fewer rotations than this are scaled by the full factor."""
    mscale: Function[NonNegativeFloat] = 1.0
    """YaRN: scale of rotated channels, 1 + 0.1 mscale ln(factor), divided by the same expression
    with --mscale-all-dim."""
    mscale_all_dim: Function[NonNegativeFloat] = 0.0
    """YaRN: scale of all latent-attention logits, (1 + 0.1 mscale_all_dim ln(factor))^2."""
    multi_latent_attention: Shape[bool] = False
    """Use DeepSeek's multi-head latent attention (arXiv 2405.04434, section 2.1): keys and values
    come from one compressed vector per token. --qk-layernorm normalises the compressed vectors."""
    q_lora_rank: Shape[PositiveInt | None] = None
    """Latent attention: width of compressed queries; unset: queries are not compressed."""
    kv_lora_rank: Shape[PositiveInt] = 512
    """Latent attention: width of compressed keys and values."""
    qk_head_dim: Shape[PositiveInt] = 128
    """Latent attention: unrotated channels per query or key head."""
    qk_pos_emb_head_dim: Shape[PositiveInt] = 64
    """Latent attention: rotated channels per head; all heads share their key."""
    v_head_dim: Shape[PositiveInt] = 128
    """Latent attention: channels per value head."""
    log_max_attention_logit: Run[bool] = False
    """Log the largest attention logit of a step, over all layers and heads."""
    qk_clip: Training[bool] = False
    """Scale query and key weights of heads with logits above the threshold down after the update,
    with any optimizer (MuonClip, arXiv 2507.20534: Muon and this)."""
    qk_clip_threshold: Training[PositiveFloat] = 100.0
    """QK-clip: largest logit of a head that needs no clip (Kimi K2: 100)."""
    qk_clip_alpha: Training[float] = Field(default=0.5, gt=0, lt=1)
    """QK-clip: queries take this power of threshold / logit, keys the rest."""
