"""Rules on the model's shape, implementation, recomputation, and on encoder-decoders."""

import os
from collections.abc import Iterator

from moetron.moe.config.rules.case import Case, nearest_multiples, not_multiple
from moetron.moe.config.schema.derived import (
    head_dim,
    query_groups,
    sequence_parallel,
)
from moetron.moe.config.schema.pipeline_split import chunk_sizes
from moetron.moe.config.schema.settings import Settings

_OF_STACKS = (
    "encoder_seq_length",
    "moe_encoder_capacity_factor",
    "moe_encoder_eval_capacity_factor",
)
"""Settings that only an encoder-decoder reads."""
_OBJECTIVES = ("span_corruption", "prefix_lm")
_WITHOUT_STACKS: dict[tuple[str, str], object] = {
    ("adaptation", "preference_loss"): None,
    ("attention", "multi_latent_attention"): False,
    ("attention", "add_qkv_bias"): False,
    ("attention", "log_max_attention_logit"): False,
    ("attention", "qk_clip"): False,
    ("model", "add_bias_linear"): False,
    ("model", "attention_backend"): "auto",
    ("model", "mtp_num_layers"): None,
    ("model", "qk_layernorm"): False,
    ("parallel", "context_parallel_size"): 1,
    ("precision", "fp8_format"): None,
    ("performance", "cuda_graph_impl"): "none",
    ("performance", "delay_wgrad_compute"): False,
    ("performance", "overlap_moe_expert_parallel_comm"): False,
    ("performance", "tp_comm_overlap"): False,
    ("data", "bidirectional_prefix"): False,
    ("data", "repetition_max_count"): None,
    ("data", "eod_mask_loss"): False,
    ("data", "reset_attention_mask"): False,
    ("data", "reset_position_ids"): False,
}
"""Settings that encoder-decoders do not support, with the values to have."""
_RECOMPUTABLE = ("core_attn", "moe_act", "layernorm", "mlp", "moe", "shared_experts")


def shape(case: Case) -> Iterator[str]:
    """Check heads, rotary channels and norms."""
    model, is_latent = case.settings.model, case.settings.attention.multi_latent_attention
    if model.kv_channels is None and not is_latent:
        yield from not_multiple(
            case, "hidden_size", model.hidden_size, "num_attention_heads", model.num_attention_heads
        )
    heads, groups = model.num_attention_heads, query_groups(model)
    if heads % groups:
        yield from not_multiple(case, "num_attention_heads", heads, "num_query_groups", groups)
    rotated = int(head_dim(model) * model.rotary_percent)
    if model.position_embedding_type == "rope" and not is_latent and (rotated % 2 or rotated == 0):
        yield (
            f"rotary embedding needs an even number of channels per head, but {rotated} of "
            f"{head_dim(model)} are rotated: set --kv-channels "
            f"{nearest_multiples(head_dim(model), 2)} (now hidden size / heads unless given) or "
            f"another --rotary-percent (now {model.rotary_percent})"
        )
    if model.qk_layernorm_scope == "full" and not model.qk_layernorm:
        yield "--qk-layernorm-scope full has no effect without --qk-layernorm: add it"
    if model.qk_layernorm_scope == "full" and model.normalization != "RMSNorm":
        yield "--qk-layernorm-scope full is an RMSNorm: use it with --normalization RMSNorm"
    if not model.norm_affine and model.qk_layernorm_scope == "full":
        yield "--no-norm-affine: the norm of --qk-layernorm-scope full has weights; leave one out"


def implementation(case: Case) -> Iterator[str]:
    """Check the limits of the layer implementation."""
    settings = case.settings
    chosen = settings.model.transformer_impl
    if chosen == "transformer_engine" and not case.te:
        yield (
            "--transformer-impl transformer_engine: Transformer Engine is not installed; "
            "install the [te] extra or use --transformer-impl auto"
        )
    if chosen == "transformer_engine" and case.device == "cpu":
        yield (
            "--transformer-impl transformer_engine needs a CUDA device: use --transformer-impl auto"
        )
    unfused = case.local and settings.model.attention_backend == "unfused"
    if unfused and settings.parallel.context_parallel_size > 1:
        yield (
            f"{case.given('context_parallel_size')} is incompatible with --attention-backend "
            "unfused, which needs the full sequence: use --attention-backend sdpa"
        )


def switches(case: Case) -> Iterator[str]:
    """Check Transformer Engine's variables, which megatron-core sets and asserts to agree."""
    unfused = case.settings.model.attention_backend == "unfused"
    chosen = {"NVTE_FLASH_ATTN": not unfused, "NVTE_FUSED_ATTN": not unfused}
    for name, value in {**chosen, "NVTE_UNFUSED_ATTN": True}.items():
        present = os.environ.get(name)
        if present not in (None, str(int(value))):
            yield (
                f"{name}={present} in the environment contradicts "
                f"{case.given('attention_backend')}, from which megatron-core sets it to "
                f"{int(value)}: unset {name}"
            )


def biases(case: Case) -> Iterator[str]:
    """Refuse biases of experts, which fail in megatron-core's backward pass without ETP."""
    if case.settings.model.add_bias_linear and case.settings.moe.num_experts is not None:
        yield "--add-bias-linear: experts have no biases; use --disable-bias-linear"


def recompute(case: Case) -> Iterator[str]:
    """Check recompute flags (TransformerConfig.__post_init__ of megatron-core)."""
    parallel = case.settings.parallel
    granularity, modules = parallel.recompute_granularity, parallel.recompute_modules
    if granularity is None:
        for name in ("recompute_method", "recompute_num_layers", "recompute_modules"):
            if getattr(parallel, name) is not None:
                yield f"{case.given(name)} has no effect without --recompute-granularity: add it"
    if granularity == "full":
        if parallel.recompute_method is None:
            yield "--recompute-granularity full needs --recompute-method uniform or block"
        if parallel.recompute_num_layers is None:
            yield "--recompute-granularity full needs --recompute-num-layers (1 saves most memory)"
        if modules is not None:
            yield "--recompute-modules is for --recompute-granularity selective: leave it out"
    if granularity == "selective":
        for name in ("recompute_method", "recompute_num_layers"):
            if getattr(parallel, name) is not None:
                yield f"{case.given(name)} is for --recompute-granularity full: leave it out"
        yield from _modules(case, modules or [])


def _modules(case: Case, modules: list[str]) -> Iterator[str]:
    """Check the modules of selective recomputation."""
    moe = case.settings.moe
    for module in modules:
        if module not in _RECOMPUTABLE:
            yield f"--recompute-modules {module}: must be among {', '.join(_RECOMPUTABLE)}"
    if "mlp" in modules and case.settings.model.add_bias_linear:
        yield (
            "--recompute-modules mlp hangs with --add-bias-linear, whose bias megatron-core passes "
            "through the recomputed part: leave mlp out, or use --recompute-granularity full"
        )
    if "moe_act" in modules and case.experts_impl != "te":
        yield (
            "--recompute-modules moe_act needs Transformer Engine's grouped experts: "
            "use moe, which recomputes the full layer"
        )
    if "shared_experts" in modules and moe.moe_shared_expert_overlap:
        yield (
            "--recompute-modules shared_experts is incompatible with --moe-shared-expert-overlap: "
            "drop one"
        )


def stacks(case: Case) -> Iterator[str]:
    """Check settings that need an encoder-decoder, and those that it needs."""
    settings = case.settings
    model, data = settings.model, settings.data
    named = {stage.objective for stage in data.planned_stages()} | {data.objective}
    if model.encoder_num_layers is None:
        for name in _OF_STACKS:
            group = data if hasattr(data, name) else settings.moe
            if getattr(group, name) is not None:
                yield f"{case.given(name)} needs --encoder-num-layers: add it or leave this out"
        if "span_corruption" in named:
            yield "--objective span_corruption is for encoder-decoders: add --encoder-num-layers"
        if model.position_embedding_type == "relative":
            yield "--position-embedding-type relative needs --encoder-num-layers: use rope"
        return
    if model.encoder_num_layers >= model.num_layers:
        yield (
            f"{case.given('encoder_num_layers')} leaves no decoder of "
            f"{case.given('num_layers')}, which counts both stacks: use at least one layer more"
        )
    if model.position_embedding_type != "relative":
        yield (
            f"{case.given('position_embedding_type')}: an encoder-decoder has relative biases; "
            "use --position-embedding-type relative"
        )
    wanted = {stage.objective for stage in data.planned_stages()}
    for name in [] if settings.adaptation.sft else sorted(wanted - set(_OBJECTIVES)):
        yield f"--objective {name}: an encoder-decoder needs {' or '.join(_OBJECTIVES)}"
    yield from _stack_lengths(case, settings)
    yield from _beyond_stacks(case, settings)


def _stack_lengths(case: Case, settings: Settings) -> Iterator[str]:
    """Check the parts of a sample."""
    length, encoder = settings.model.seq_length, settings.data.encoder_seq_length
    if encoder is None:
        yield "--encoder-num-layers needs --encoder-seq-length, the encoder's part of a sample"
        return
    if encoder >= length:
        yield (
            f"{case.given('encoder_seq_length')} leaves the decoder nothing of "
            f"{case.given('seq_length')}: use a longer sample"
        )
    ranks = settings.parallel.tensor_model_parallel_size
    if sequence_parallel(settings.parallel) and (encoder % ranks or length % ranks):
        yield (
            f"{case.given('encoder_seq_length', 'seq_length')} are not both multiples of "
            f"{case.given('tensor_model_parallel_size')}, whose ranks split each stack's tokens: "
            "use a longer --seq-length, whose last positions are padding"
        )
    parts = settings.data.examples_per_sample
    if encoder % parts:
        yield f"{case.given('examples_per_sample')} does not divide --encoder-seq-length {encoder}"


def _beyond_stacks(case: Case, settings: Settings) -> Iterator[str]:
    """Check what encoder-decoders lack."""
    for (group, name), value in _WITHOUT_STACKS.items():
        if getattr(getattr(settings, group), name) != value:
            yield f"{case.given(name)} is not supported by encoder-decoders: leave it out"
    model, moe, parallel = settings.model, settings.moe, settings.parallel
    if not case.local:
        yield "an encoder-decoder has local layers: use --transformer-impl local (or auto)"
    if query_groups(model) != model.num_attention_heads:
        yield f"{case.given('num_query_groups')}: cross-attention has as many key heads as queries"
    if moe.num_experts is not None and moe.moe_router_type in ("hash", "reinforce"):
        yield f"{case.given('moe_router_type')} is not supported by encoder-decoders: use topk"
    if "core_attn" in (parallel.recompute_modules or []):
        yield "--recompute-modules core_attn is not supported by encoder-decoders: use full"
    if parallel.recompute_granularity == "selective" and parallel.recompute_modules is None:
        yield "--recompute-granularity selective recomputes core_attn: name other modules, or full"
    if parallel.pipeline_model_parallel_size > 1 and not chunk_sizes(settings)[-1]:
        yield "the last pipeline chunk of an encoder-decoder needs a layer: change the layout"


def encoder_capacities(case: Case) -> Iterator[str]:
    """Check the encoder's own capacity factors."""
    moe = case.settings.moe
    for name in ("moe_encoder_capacity_factor", "moe_encoder_eval_capacity_factor"):
        if getattr(moe, name) is not None and moe.moe_expert_capacity_factor is None:
            yield f"{case.given(name)} needs --moe-expert-capacity-factor: add it"


RULES = (shape, implementation, switches, biases, recompute, stacks, encoder_capacities)
