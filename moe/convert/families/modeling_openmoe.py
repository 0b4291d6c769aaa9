"""OpenMoE (arXiv 2402.01739) for transformers; this file needs only transformers and torch.

A decoder whose FFNs have four matrices, down(silu(gate x) * up x * linear x). Some layers have
experts instead of the FFN, with a dense FFN in parallel (the paper's equation 4) or after them with
its own norm (the released code). Exported folders include this file; load them with
``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)``. No token is dropped.
"""

from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

OUTPUT_FIELDS = {field.name for field in fields(CausalLMOutputWithPast)}
CACHE_FIELD = "cache" if "cache" in OUTPUT_FIELDS else "past_key_values"
"""Output field in which the installed version's ``generate`` expects the cache."""


class OpenMoeConfig(PretrainedConfig):
    """Configuration, ``config.json``.

    Args:
        vocab_size: rows of the embedding and of the output matrix, which are separate.
        hidden_size: width of the residual stream.
        intermediate_size: inner width of a dense layer's FFN; None: no such layer.
        num_hidden_layers: layers.
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads; None: as query heads.
        head_dim: width of a head.
        attention_scale: multiplies attention logits; None: 1 / sqrt(head_dim).
        max_position_embeddings: longest training sequence.
        rms_norm_eps: epsilon of every RMSNorm.
        rope_theta: base of the rotary embedding.
        moe_layers: for each layer 1 if it has experts, else 0.
        num_experts: experts per such layer.
        num_experts_per_tok: experts per token.
        norm_topk_prob: normalise their weights to sum 1; otherwise raw softmax probabilities.
        moe_intermediate_size: inner width of an expert.
        shared_expert_intermediate_size: width of the FFN beside the experts; None: no such FFN.
        extra_intermediate_size: width of the FFN after the experts; None: no such FFN.
        kwargs: of ``PretrainedConfig``.
    """

    model_type = "openmoe"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size: int = 256_384,
        hidden_size: int = 768,
        intermediate_size: int | None = 2048,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        num_key_value_heads: int | None = None,
        head_dim: int = 64,
        attention_scale: float | None = 1.0,
        max_position_embeddings: int = 2048,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 10_000.0,
        moe_layers: list[int] | None = None,
        num_experts: int = 16,
        num_experts_per_tok: int = 2,
        norm_topk_prob: bool = False,
        moe_intermediate_size: int = 2048,
        shared_expert_intermediate_size: int | None = None,
        extra_intermediate_size: int | None = 2048,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim
        self.attention_scale = attention_scale
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.moe_layers = moe_layers or [int(n % 4 == 3) for n in range(num_hidden_layers)]
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.norm_topk_prob = norm_topk_prob
        self.moe_intermediate_size = moe_intermediate_size
        self.shared_expert_intermediate_size = shared_expert_intermediate_size
        self.extra_intermediate_size = extra_intermediate_size
        super().__init__(**{"tie_word_embeddings": False, **kwargs})


def rotated(x_BhSd: Tensor, positions_BS: Tensor, theta: float) -> Tensor:
    """Apply rotary embedding to heads [B, h, S, d]; channel i pairs with i + d / 2."""
    width = x_BhSd.shape[-1]
    steps = torch.arange(0, width, 2, device=x_BhSd.device, dtype=torch.float32) / width
    angles_BSf = positions_BS[..., None].float() * theta**-steps
    angles_BhSd = torch.cat([angles_BSf, angles_BSf], dim=-1)[:, None]
    left, right = x_BhSd.float().chunk(2, dim=-1)
    turned = torch.cat([-right, left], dim=-1)
    return (x_BhSd.float() * angles_BhSd.cos() + turned * angles_BhSd.sin()).to(x_BhSd.dtype)


class OpenMoeAttention(nn.Module):
    """Causal attention with rotary positions."""

    def __init__(self, config: OpenMoeConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.theta = layer, config.rope_theta
        self.head_dim, self.scale = config.head_dim, config.attention_scale
        heads = config.num_attention_heads * config.head_dim
        groups = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, heads, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, groups, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, groups, bias=False)
        self.o_proj = nn.Linear(heads, config.hidden_size, bias=False)

    def forward(
        self, hidden_BSH: Tensor, positions_BS: Tensor, mask: Tensor, cache: DynamicCache | None
    ) -> Tensor:
        """Attend; ``mask`` bool [B, 1, S, keys] is True for visible keys."""
        query, key, value = (
            project(hidden_BSH).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = (rotated(x, positions_BS, self.theta) for x in (query, key))
        if cache is not None:
            key, value = cache.update(key, value, self.layer)
        mixed_BhSd = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=self.scale, enable_gqa=True
        )
        output: Tensor = self.o_proj(mixed_BhSd.transpose(1, 2).flatten(-2))
        return output


class OpenMoeMLP(nn.Module):
    """Double-gated FFN, down(silu(gate x) * up x * linear x)."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.linear_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        inner = F.silu(self.gate_proj(x)) * self.up_proj(x) * self.linear_proj(x)
        output: Tensor = self.down_proj(inner)
        return output


class OpenMoeExperts(nn.Module):
    """Top-k experts with fp32 router scores."""

    def __init__(self, config: OpenMoeConfig) -> None:
        super().__init__()
        self.topk, self.normalised = config.num_experts_per_tok, config.norm_topk_prob
        hidden, width = config.hidden_size, config.moe_intermediate_size
        self.gate = nn.Linear(hidden, config.num_experts, bias=False)
        self.experts = nn.ModuleList(OpenMoeMLP(hidden, width) for _ in range(config.num_experts))
        shared = config.shared_expert_intermediate_size
        self.shared_expert = None if shared is None else OpenMoeMLP(hidden, shared)

    def forward(self, hidden_BSH: Tensor) -> Tensor:
        """[B, S, H] -> [B, S, H]."""
        x_TH = hidden_BSH.flatten(0, 1)
        scores_TE = F.linear(x_TH.float(), self.gate.weight.float()).softmax(-1)
        weights_TK, chosen_TK = scores_TE.topk(self.topk)
        if self.normalised:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        output_TH = torch.zeros_like(x_TH)
        for number in chosen_TK.unique().tolist():
            tokens, places = (chosen_TK == number).nonzero(as_tuple=True)
            outputs = self.experts[number](x_TH[tokens]) * weights_TK[tokens, places, None]
            output_TH.index_add_(0, tokens, outputs.to(x_TH.dtype))
        if self.shared_expert is not None:
            output_TH = output_TH + self.shared_expert(x_TH)
        return output_TH.view_as(hidden_BSH)


class OpenMoeLayer(nn.Module):
    """Pre-norm layer: attention, an FFN or experts, optional extra FFN."""

    def __init__(self, config: OpenMoeConfig, layer: int) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = nn.RMSNorm(hidden, eps)
        self.self_attn = OpenMoeAttention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps)
        self.extra_mlp: nn.Module | None = None
        if not config.moe_layers[layer]:
            assert config.intermediate_size is not None
            self.mlp: nn.Module = OpenMoeMLP(hidden, config.intermediate_size)
            return
        self.mlp = OpenMoeExperts(config)
        if config.extra_intermediate_size is not None:
            self.pre_extra_mlp_layernorm = nn.RMSNorm(hidden, eps)
            self.extra_mlp = OpenMoeMLP(hidden, config.extra_intermediate_size)

    def forward(self, x_BSH: Tensor, *attended: Any) -> Tensor:
        """Run the layer; ``attended`` are further arguments of the attention."""
        x_BSH = x_BSH + self.self_attn(self.input_layernorm(x_BSH), *attended)
        x_BSH = x_BSH + self.mlp(self.post_attention_layernorm(x_BSH))
        if self.extra_mlp is not None:
            x_BSH = x_BSH + self.extra_mlp(self.pre_extra_mlp_layernorm(x_BSH))
        return x_BSH


class OpenMoeModel(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: OpenMoeConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(OpenMoeLayer(config, layer) for layer in layers)
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)


class OpenMoeForCausalLM(PreTrainedModel, GenerationMixin):
    """OpenMoE with its output matrix."""

    config_class = OpenMoeConfig
    base_model_prefix = "model"
    _no_split_modules = ["OpenMoeLayer"]

    def __init__(self, config: OpenMoeConfig) -> None:
        super().__init__(config)
        self.model = OpenMoeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool = False,
        cache: DynamicCache | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits [B, S, V] of ``input_ids`` [B, S] and the mean loss of shifted ``labels``.

        ``attention_mask`` [B, keys] is 0 for padding, ``position_ids`` [B, S] count tokens.
        ``past_key_values``, named ``cache`` in later versions of transformers 5, has keys and
        values of earlier tokens.
        """
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache()
        past = 0 if cache is None else cache.get_seq_length()
        keys = torch.arange(past + input_ids.shape[1], device=input_ids.device)
        if position_ids is None:
            position_ids = keys[None, past:]
        mask = (keys <= keys[past:, None])[None, None]
        if attention_mask is not None:
            mask = mask & attention_mask[:, None, None].bool()
        hidden_BSH = self.model.embed_tokens(input_ids)
        for layer in self.model.layers:
            hidden_BSH = layer(hidden_BSH, position_ids, mask, cache)
        logits = self.lm_head(self.model.norm(hidden_BSH))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        kept: dict[str, Any] = {CACHE_FIELD: cache}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **kept)
