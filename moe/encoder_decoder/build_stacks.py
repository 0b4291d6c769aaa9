"""Build the model that the settings describe, encoder-decoders included."""

import math
from dataclasses import replace
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import CrossAttention, CrossAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from moetron.moe.config.bridge import ModelConfig
from moetron.moe.config.schema import derived
from moetron.moe.config.schema.settings import Settings
from moetron.moe.encoder_decoder.encoder_decoder_model import EncoderDecoderModel
from moetron.moe.encoder_decoder.stack_attention import StackAttention
from moetron.moe.encoder_decoder.stack_layers import SequentialFfnStackLayer, StackLayer
from moetron.moe.layers.build_model import build_model, finish
from moetron.moe.layers.ffn import SequentialFfnLayer
from moetron.moe.layers.language_model import LanguageModel
from moetron.moe.layers.specs import block_spec


def build(
    settings: Settings,
    config: ModelConfig,
    vocab_size: int,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
) -> LanguageModel:
    """Build one pipeline chunk; arguments and errors as those of `build_model`."""
    if settings.model.encoder_num_layers is None:
        return build_model(settings, config, vocab_size, pre_process, post_process, vp_stage)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = settings.model
    built = EncoderDecoderModel(
        config=config,
        transformer_layer_spec=_stack_spec(settings, config, groups, post_process, vp_stage),
        vocab_size=derived.padded_vocab_size(vocab_size, settings),
        max_sequence_length=model.seq_length,
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=True,
        share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
        position_embedding_type="none",
        pg_collection=groups,
        vp_stage=vp_stage,
        settings=settings,
        chunk=vp_stage or 0,
    )
    finish(built, settings, config, groups, vocab_size, vp_stage)
    if model.query_init_folds_scale:
        for module in built.modules():
            if isinstance(module, CrossAttention):
                width = module.hidden_size_per_attention_head
                module.linear_q.weight.detach().div_(math.sqrt(width))
    return built


def _stack_spec(
    settings: Settings,
    config: ModelConfig,
    groups: ProcessGroupCollection,
    post_process: bool,
    vp_stage: int | None,
) -> TransformerBlockSubmodules:
    """Return `block_spec` with the layers of both stacks."""
    chunk = block_spec(settings, config, groups, vp_stage)
    first = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=groups.pp.rank())
    stacks = derived.stack_layers(settings.model)
    last = first + len(chunk.layer_specs) - 1
    layers = []
    for number, spec in enumerate(chunk.layer_specs, first):
        stack = "encoder" if number in stacks["encoder"] else "decoder"
        ends, joins = number == stacks[stack][-1], number == last and not post_process
        layers.append(_stack_layer(spec, stack, {"stack": stack, "ends": ends, "joins": joins}))
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=chunk.layer_norm)


def _stack_layer(spec: ModuleSpec, stack: str, place: dict[str, Any]) -> ModuleSpec:
    """Return the spec of a decoder-only layer as one of a stack's; ``place``: its arguments."""
    module = SequentialFfnStackLayer if spec.module is SequentialFfnLayer else StackLayer
    attention = spec.submodules.self_attention
    own = replace(
        attention, submodules=replace(attention.submodules, core_attention=StackAttention)
    )
    submodules = replace(spec.submodules, self_attention=own)
    if stack == "decoder":
        cross = CrossAttentionSubmodules(
            linear_q=attention.submodules.linear_qkv,
            linear_kv=attention.submodules.linear_qkv,
            core_attention=StackAttention,
            linear_proj=attention.submodules.linear_proj,
        )
        submodules.pre_cross_attn_layernorm = spec.submodules.input_layernorm
        submodules.cross_attention = ModuleSpec(
            CrossAttention, {"attn_mask_type": AttnMaskType.padding}, cross
        )
        submodules.cross_attn_bda = get_bias_dropout_add
    return ModuleSpec(module, {**(spec.params or {}), **place}, submodules)
