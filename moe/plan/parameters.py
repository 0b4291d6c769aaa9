"""Parameter counts by part and by rank, computed from settings."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal, get_args

from moetron.moe.config.schema import derived
from moetron.moe.config.schema.pipeline_split import stage_chunks
from moetron.moe.config.schema.settings import Settings

Part = Literal[
    "embedding",
    "output",
    "attention",
    "cross_attention",
    "relative_bias",
    "norms",
    "dense_ffn",
    "router",
    "experts",
    "shared_experts",
    "token_prediction",
]
Sharding = Literal["none", "tensor", "expert"]
"""Ranks that shard a tensor: none, TP, or EP x ETP."""


_NEVER_HIDDEN = ("embedding", "output", "norms", "relative_bias")
"""Parts without hidden matrices."""


@dataclass(frozen=True)
class Tensors:
    """Parameters of one part with the same sharding."""

    part: Part
    elements: int
    sharding: Sharding
    is_expert: bool = False
    """Gradients are reduced over the expert-data-parallel group."""
    is_vector: bool = False
    """A vector, or one per expert, in any shape."""

    @property
    def is_hidden_matrix(self) -> bool:
        """Muon updates it (moe/training/optimizer.py); AdamW updates the others."""
        return not self.is_vector and self.part not in _NEVER_HIDDEN


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model, including padding rows of the vocabulary."""

    parts: dict[Part, int]
    active: int
    """Active parameters per token: k of E experts and the rest, without token prediction."""
    active_ahead: int
    """Active parameters per token of multi-token prediction modules, used only in training."""

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self.parts.values())

    @property
    def main(self) -> int:
        """All but multi-token prediction: the size in model cards."""
        return self.total - self.parts["token_prediction"]

    @property
    def embedding(self) -> int:
        """Vocabulary matrices: input embedding, and output layer unless tied."""
        return self.parts["embedding"] + self.parts["output"]


@dataclass(frozen=True)
class RankParameters:
    """Parameters of one rank."""

    dense: int
    """Reduced over data- and context-parallel ranks."""
    expert: int
    """Reduced over expert-data-parallel ranks."""


def _norm(settings: Settings, width: int) -> int:
    """Return the parameters of a norm: a weight, and LayerNorm's bias."""
    if not settings.model.norm_affine:
        return 0
    return width * (2 if settings.model.normalization == "LayerNorm" else 1)


def _attention(settings: Settings) -> Iterator[Tensors]:
    model = settings.model
    width, head = model.hidden_size, derived.head_dim(model)
    if settings.attention.multi_latent_attention:
        yield from _latent_attention(settings)
        return
    queries, keys = model.num_attention_heads * head, derived.query_groups(model) * head
    yield Tensors("attention", width * (queries + 2 * keys) + queries * width, "tensor")
    if model.add_bias_linear or settings.attention.add_qkv_bias:
        yield Tensors("attention", queries + 2 * keys, "tensor", is_vector=True)
    if model.add_bias_linear:
        yield Tensors("attention", width, "none", is_vector=True)
    if model.qk_layernorm and model.qk_layernorm_scope == "full":
        yield Tensors("norms", _norm(settings, queries + keys), "tensor")
    elif model.qk_layernorm:
        yield Tensors("norms", _norm(settings, 2 * head), "none")


def _latent_attention(settings: Settings) -> Iterator[Tensors]:
    """Yield latent attention; TP replicates compression and norms and shards the rest by heads."""
    model, latent = settings.model, settings.attention
    width, heads = model.hidden_size, model.num_attention_heads
    head, value_head = derived.attention_widths(settings)
    yield Tensors("attention", width * (latent.kv_lora_rank + latent.qk_pos_emb_head_dim), "none")
    up = latent.kv_lora_rank * heads * (latent.qk_head_dim + value_head)
    yield Tensors("attention", up + heads * value_head * width, "tensor")
    normalised = latent.kv_lora_rank
    if latent.q_lora_rank is None:
        yield Tensors("attention", width * heads * head, "tensor")
    else:
        yield Tensors("attention", width * latent.q_lora_rank, "none")
        yield Tensors("attention", latent.q_lora_rank * heads * head, "tensor")
        normalised += latent.q_lora_rank
    if model.qk_layernorm:
        yield Tensors("norms", _norm(settings, normalised), "none")


def _ffn(
    settings: Settings, part: Part, ffn_size: int, copies: int = 1, sharding: Sharding = "tensor"
) -> Iterator[Tensors]:
    """Yield ``copies`` FFNs of width ``ffn_size``; TP does not shard the output bias."""
    model, is_expert = settings.model, sharding == "expert"
    inner = ffn_size * derived.ffn_inner_matrices(model)
    matrices = model.hidden_size * (inner + ffn_size)
    yield Tensors(part, copies * matrices, sharding, is_expert)
    if model.add_bias_linear:
        yield Tensors(part, copies * inner, sharding, is_expert, is_vector=True)
        # Experts have biases only at ETP 1, so theirs are sharded only over EP.
        output: Sharding = sharding if is_expert else "none"
        yield Tensors(part, copies * model.hidden_size, output, is_expert, is_vector=True)


def layer(settings: Settings, has_experts: bool, crosses: bool = False) -> Iterator[Tensors]:
    """Yield the parameters of one transformer layer, which has cross-attention if it crosses."""
    model, moe = settings.model, settings.moe
    yield Tensors("norms", (3 if crosses else 2) * _norm(settings, model.hidden_size), "none")
    yield from _attention(settings)
    if crosses:
        matrix = model.hidden_size * model.num_attention_heads * derived.head_dim(model)
        yield Tensors("cross_attention", 4 * matrix, "tensor")
    if not has_experts:
        yield from _ffn(settings, "dense_ffn", derived.dense_ffn_size(model))
        return
    assert moe.num_experts is not None
    matrices = {"noisy_topk": 2, "hash": 0}.get(moe.moe_router_type, 1)
    yield Tensors("router", matrices * moe.num_experts * model.hidden_size, "none")
    yield from _ffn(
        settings, "experts", derived.expert_ffn_size(settings), moe.num_experts, "expert"
    )
    if moe.moe_expert_multiplicative_bias:
        scales = moe.num_experts * derived.expert_ffn_size(settings)
        yield Tensors("experts", scales, "expert", is_expert=True, is_vector=True)
    if moe.moe_sequential_ffn_hidden_size is not None:
        yield Tensors("norms", _norm(settings, model.hidden_size), "none")
        yield from _ffn(settings, "dense_ffn", moe.moe_sequential_ffn_hidden_size)
    if moe.moe_shared_expert_intermediate_size is not None:
        yield from _ffn(settings, "shared_experts", moe.moe_shared_expert_intermediate_size)
        if moe.moe_shared_expert_gate:
            yield Tensors("shared_experts", model.hidden_size, "none", is_vector=True)


def layers(settings: Settings, indices: range) -> Iterator[Tensors]:
    """Yield the parameters of some layers, with the final norm of an encoder that ends there."""
    encoder, pattern = settings.model.encoder_num_layers, derived.moe_layers(settings)
    for index in indices:
        yield from layer(settings, pattern[index], encoder is not None and index >= encoder)
        if encoder is not None and index == encoder - 1:
            yield Tensors("norms", _norm(settings, settings.model.hidden_size), "none")


def _relative_biases(settings: Settings) -> Iterator[Tensors]:
    """Yield the tables of relative positions, one for each stack, which every chunk holds."""
    model = settings.model
    if model.position_embedding_type == "relative":
        entries = model.relative_attention_num_buckets * model.num_attention_heads
        yield Tensors("relative_bias", len(derived.stack_layers(model)) * entries, "none")


def _prediction(settings: Settings) -> Iterator[Tensors]:
    """Yield one multi-token prediction module without its layer: three norms and a projection."""
    width = settings.model.hidden_size
    yield Tensors("norms", 3 * _norm(settings, width), "none")
    yield Tensors("token_prediction", 2 * width * width, "tensor")


def _ahead(settings: Settings) -> list[Tensors]:
    """Return all multi-token prediction modules, including layers."""
    has_experts = derived.moe_layers(settings)[-1]
    module = [*_prediction(settings), *layer(settings, has_experts)]
    return module * (settings.model.mtp_num_layers or 0)


def norms_ahead(settings: Settings) -> int:
    """Return the norm parameters of multi-token prediction modules."""
    return sum(tensor.elements for tensor in _ahead(settings) if tensor.part == "norms")


def _ends(settings: Settings, vocab_size: int, first: bool, last: bool) -> Iterator[Tensors]:
    """Yield the parameters of the first and last chunk outside of layers.

    Tied embeddings, and those that multi-token prediction looks up, are on both.
    """
    matrix = derived.padded_vocab_size(vocab_size, settings) * settings.model.hidden_size
    untied = settings.model.untie_embeddings_and_output_weights
    looks_up = first or (last and settings.model.mtp_num_layers is not None)
    if looks_up:
        yield Tensors("embedding", matrix, "tensor")
    if last:
        yield Tensors("norms", _norm(settings, settings.model.hidden_size), "none")
    if last and (untied or not looks_up):
        yield Tensors("output", matrix, "tensor")


def count_parameters(settings: Settings, vocab_size: int) -> ParameterCount:
    """Return the parameters of the model by part."""
    parts: dict[Part, int] = dict.fromkeys(get_args(Part), 0)
    tensors = [
        *_ends(settings, vocab_size, first=True, last=True),
        *_relative_biases(settings),
        *layers(settings, range(settings.model.num_layers)),
    ]
    ahead = _ahead(settings)
    for tensor in [*tensors, *(replace(tensor, part="token_prediction") for tensor in ahead)]:
        parts[tensor.part] += tensor.elements
    return ParameterCount(parts, active(settings, tensors), active(settings, ahead))


def active(settings: Settings, tensors: list[Tensors]) -> int:
    """Return the parameters of ``tensors`` that are active for one token."""
    experts = sum(tensor.elements for tensor in tensors if tensor.part == "experts")
    count = settings.moe.num_experts or 1
    idle = experts // count * (count - settings.moe.moe_router_topk)
    return sum(tensor.elements for tensor in tensors) - idle


def per_rank(settings: Settings, vocab_size: int, stage: int) -> RankParameters:
    """Return the parameters of a rank of pipeline stage ``stage``."""
    return _sums(_held(settings, vocab_size, stage))


def per_chunk(settings: Settings, vocab_size: int, stage: int, chunk: int) -> RankParameters:
    """Return the parameters of chunk ``chunk`` (virtual stage) of a rank of stage ``stage``.

    The chunks of a rank add up to `per_rank`.
    """
    return _sums(_held_by_chunk(settings, vocab_size, stage, chunk))


def _sums(held: list[tuple[Tensors, int]]) -> RankParameters:
    return RankParameters(
        dense=sum(elements for tensor, elements in held if not tensor.is_expert),
        expert=sum(elements for tensor, elements in held if tensor.is_expert),
    )


def hidden_matrices(settings: Settings, vocab_size: int, stage: int) -> int:
    """Return the parameters of a rank of pipeline stage ``stage`` that Muon updates."""
    held = _held(settings, vocab_size, stage)
    return sum(elements for tensor, elements in held if tensor.is_hidden_matrix)


def _held(settings: Settings, vocab_size: int, stage: int) -> list[tuple[Tensors, int]]:
    """Return the tensors of a stage with the elements that one of its ranks holds."""
    chunks = range(len(stage_chunks(settings, stage)))
    held = (_held_by_chunk(settings, vocab_size, stage, chunk) for chunk in chunks)
    return list(chain.from_iterable(held))


def _held_by_chunk(
    settings: Settings, vocab_size: int, stage: int, chunk: int
) -> list[tuple[Tensors, int]]:
    """Return the tensors of a stage's chunk with the elements that one rank holds."""
    parallel = settings.parallel
    divisor: dict[Sharding, int] = {
        "none": 1,
        "tensor": parallel.tensor_model_parallel_size,
        "expert": parallel.expert_model_parallel_size
        * derived.expert_tensor_parallel_size(parallel),
    }
    chunks, stages = stage_chunks(settings, stage), parallel.pipeline_model_parallel_size
    first, last = stage == chunk == 0, stage == stages - 1 and chunk == len(chunks) - 1
    tensors = [
        *_ends(settings, vocab_size, first, last),
        *_relative_biases(settings),
        *layers(settings, chunks[chunk]),
    ]
    if last:
        tensors += _ahead(settings)
    return [(tensor, tensor.elements // divisor[tensor.sharding]) for tensor in tensors]
