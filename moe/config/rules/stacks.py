"""Rules on encoder-decoders."""

from collections.abc import Iterator

from moetron.moe.config.rules.case import Case
from moetron.moe.config.schema import derived
from moetron.moe.config.schema.pipeline_split import chunk_sizes
from moetron.moe.config.schema.settings import Settings

_OF_STACKS = (
    "encoder_seq_length",
    "moe_encoder_capacity_factor",
    "moe_encoder_eval_capacity_factor",
)
"""Settings that only an encoder-decoder reads."""
_OBJECTIVES = ("span_corruption", "seq2seq")
_WITHOUT_STACKS: dict[tuple[str, str], object] = {
    ("attention", "multi_latent_attention"): False,
    ("attention", "add_qkv_bias"): False,
    ("model", "add_bias_linear"): False,
    ("model", "attention_backend"): "auto",
    ("model", "mtp_num_layers"): None,
    ("model", "qk_layernorm"): False,
    ("parallel", "context_parallel_size"): 1,
    ("precision", "fp8_format"): None,
    ("performance", "cuda_graph_impl"): "none",
    ("data", "bidirectional_prefix"): False,
    ("data", "repetition_max_count"): None,
    ("data", "eod_mask_loss"): False,
}
"""Settings that encoder-decoders do not support, with the values to have."""


def presence(case: Case) -> Iterator[str]:
    """Check settings that need an encoder-decoder, and those that it needs."""
    settings = case.settings
    model, data = settings.model, settings.data
    named = {stage.objective for stage in data.planned_stages()} | {data.objective}
    if model.encoder_num_layers is None:
        for name in _OF_STACKS:
            group = data if hasattr(data, name) else settings.moe
            if getattr(group, name) is not None:
                yield f"{case.given(name)} needs --encoder-num-layers: add it or leave this out"
        for name in sorted(named & set(_OBJECTIVES)):
            yield f"--objective {name} is for encoder-decoders: add --encoder-num-layers"
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
            f"{case.given('position_embedding_type')}: an encoder-decoder has T5's relative biases; "
            "use --position-embedding-type relative"
        )
    wanted = {stage.objective for stage in data.planned_stages()}
    for name in sorted(wanted - set(_OBJECTIVES)):
        yield f"--objective {name}: an encoder-decoder needs {' or '.join(_OBJECTIVES)}"
    yield from _lengths(case, settings)
    yield from _unsupported(case, settings)


def _lengths(case: Case, settings: Settings) -> Iterator[str]:
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
    if derived.sequence_parallel(settings.parallel) and (encoder % ranks or length % ranks):
        yield (
            f"{case.given('encoder_seq_length', 'seq_length')} are not both multiples of "
            f"{case.given('tensor_model_parallel_size')}, whose ranks split each stack's tokens: "
            "use a longer --seq-length, whose last positions are padding"
        )
    parts = settings.data.examples_per_sample
    if encoder % parts:
        yield f"{case.given('examples_per_sample')} does not divide --encoder-seq-length {encoder}"


def _unsupported(case: Case, settings: Settings) -> Iterator[str]:
    """Check what encoder-decoders lack."""
    for (group, name), value in _WITHOUT_STACKS.items():
        if getattr(getattr(settings, group), name) != value:
            yield f"{case.given(name)} is not supported by encoder-decoders: leave it out"
    model, moe, parallel = settings.model, settings.moe, settings.parallel
    if not case.local:
        yield "an encoder-decoder has local layers: use --transformer-impl local (or auto)"
    if derived.query_groups(model) != model.num_attention_heads:
        yield f"{case.given('num_query_groups')}: cross-attention has as many key heads as queries"
    if moe.num_experts is not None and moe.moe_router_type in ("hash", "reinforce"):
        yield f"{case.given('moe_router_type')} is not supported by encoder-decoders: use topk"
    if "core_attn" in (parallel.recompute_modules or []):
        yield "--recompute-modules core_attn is not supported by encoder-decoders: use full"
    if parallel.recompute_granularity == "selective" and parallel.recompute_modules is None:
        yield "--recompute-granularity selective recomputes core_attn: name other modules, or full"
    if parallel.pipeline_model_parallel_size > 1 and not chunk_sizes(settings)[-1]:
        yield "the last pipeline chunk of an encoder-decoder needs a layer: change the layout"


def capacities(case: Case) -> Iterator[str]:
    """Check the encoder's own capacity factors."""
    moe = case.settings.moe
    for name in ("moe_encoder_capacity_factor", "moe_encoder_eval_capacity_factor"):
        if getattr(moe, name) is not None and moe.moe_expert_capacity_factor is None:
            yield f"{case.given(name)} needs --moe-expert-capacity-factor: add it"


RULES = (presence, capacities)
