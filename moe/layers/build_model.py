"""Build the model: megatron-core's GPTModel from our specs."""

import math
from collections.abc import Iterable

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.moe.moe_layer import MoELayer

from moetron.common.errors import RunError
from moetron.moe.config.bridge import ModelConfig
from moetron.moe.config.schema import derived
from moetron.moe.config.schema.settings import Settings
from moetron.moe.host.device import uses_transformer_engine
from moetron.moe.layers.dispatcher import keep_tokens_local
from moetron.moe.layers.experts import mark_gradient_ranks
from moetron.moe.layers.language_model import LanguageModel
from moetron.moe.layers.norm import FullWidthRMSNorm
from moetron.moe.layers.specs import block_spec, prediction_spec
from moetron.moe.plan.parameters import RankParameters, per_chunk
from moetron.moe.routing.hash import HashRouter


def build_model(
    settings: Settings,
    config: ModelConfig,
    vocab_size: int,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
) -> LanguageModel:
    """Build one pipeline stage (or virtual stage) of the model with initialised weights.

    megatron's parallel state and random states must be initialised (and `adapt_host` called on a
    host). Logits stay split over tensor ranks along the vocabulary. Under ``torch.device("meta")``
    on an adapted host nothing is allocated.

    Args:
        settings: the full tree.
        config: ``transformer_config(settings)``.
        vocab_size: rows of the vocabulary; padded here to ``--make-vocab-size-divisible-by``
            (padding a padded size changes nothing).
        pre_process: this stage holds the embedding.
        post_process: this stage holds the final norm and the output layer.
        vp_stage: virtual pipeline stage; None without interleaving.

    Raises:
        RunError: the parameter counts differ from those planned for the settings (moe/plan).
    """
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = settings.model
    built = LanguageModel(
        config=config,
        transformer_layer_spec=block_spec(settings, config, groups, vp_stage),
        vocab_size=derived.padded_vocab_size(vocab_size, settings),
        max_sequence_length=model.seq_length,
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=True,
        share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
        position_embedding_type=model.position_embedding_type,
        rotary_percent=model.rotary_percent,
        rotary_base=model.rotary_base,
        rope_scaling=settings.attention.rope_type == "llama3",
        rope_scaling_factor=settings.attention.rotary_scaling_factor,
        mtp_block_spec=prediction_spec(settings, config, groups, vp_stage),
        pg_collection=groups,
        vp_stage=vp_stage,
    )
    finish(built, settings, config, groups, vocab_size, vp_stage)
    return built


def finish(
    built: LanguageModel,
    settings: Settings,
    config: ModelConfig,
    groups: ProcessGroupCollection,
    vocab_size: int,
    vp_stage: int | None,
) -> None:
    """Set up the blocks of a chunk just built; arguments and errors as those of `build_model`."""
    model = settings.model
    built.bidirectional_prefix = settings.data.bidirectional_prefix
    built.takes_packed_sequences = uses_transformer_engine(settings)
    for module in built.modules():
        if isinstance(module, MoELayer):
            mark_gradient_ranks(module.experts, groups)
            keep_tokens_local(module, groups)
            if isinstance(module.router, HashRouter):
                module.router.draw_table(derived.padded_vocab_size(vocab_size, settings))
            if config.moe_pad_expert_input_to_capacity:
                module.router.padded_dispatcher = module.token_dispatcher
        if isinstance(module, SelfAttention):
            if model.qk_layernorm and model.qk_layernorm_scope == "full":
                _normalise_full_width(module)
            if model.query_init_folds_scale:
                _shrink_queries(module)
    planned = per_chunk(settings, vocab_size, groups.pp.rank(), vp_stage or 0)
    _check_parameters(planned, count_built([built]), groups.pp.rank(), vp_stage)


def count_built(chunks: Iterable[torch.nn.Module]) -> RankParameters:
    """Count the parameters in the chunks of a rank, dense and expert ones."""
    held = {False: 0, True: 0}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            held[".experts." in name] += parameter.numel()  # shared experts: ".shared_experts."
    return RankParameters(dense=held[False], expert=held[True])


def _check_parameters(
    planned: RankParameters, built: RankParameters, stage: int, vp_stage: int | None
) -> None:
    """Raise RunError unless the counts agree: a spec that omits a block trains another model."""
    if built == planned:
        return
    place = f"pipeline stage {stage}" + ("" if vp_stage is None else f", chunk {vp_stage}")
    raise RunError(
        f"the model built is not the one that the settings describe: {place} has "
        f"{built.dense:,} parameters and {built.expert:,} of experts on a rank, planned were "
        f"{planned.dense:,} and {planned.expert:,}. This is a bug in Moetron or in the installed "
        "megatron-core: please report it with the settings"
    )


def _normalise_full_width(attention: SelfAttention) -> None:
    """Give ``attention`` norms over full projections, which specs cannot: theirs are per head."""
    config, group = attention.config, attention.pg_collection.tp
    heads = {"q": config.num_attention_heads, "k": config.num_query_groups}
    for name, count in heads.items():
        norm = FullWidthRMSNorm(
            config,
            attention.hidden_size_per_attention_head,
            config.layernorm_epsilon,
            heads=count,
            tp_group=group,
        )
        setattr(attention, f"{name}_layernorm", norm)


def _shrink_queries(attention: SelfAttention) -> None:
    """Divide the query rows of ``linear_qkv`` by sqrt(head width); keys and values are unchanged.

    The rows of a query group are its queries, its key and its value, in this order.
    """
    width, weight = attention.hidden_size_per_attention_head, attention.linear_qkv.weight
    queries = (
        attention.num_attention_heads_per_partition // attention.num_query_groups_per_partition
    )
    groups = weight.detach().view(-1, queries + 2, width, weight.shape[1])
    groups[:, :queries].div_(math.sqrt(width))
