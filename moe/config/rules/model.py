"""Rules on the model's shape, its implementation and recomputation."""

import os
from collections.abc import Iterator

from moetron.moe.config.rules.case import Case, nearest_multiples, not_multiple
from moetron.moe.config.schema.derived import head_dim, query_groups

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


RULES = (shape, implementation, switches, biases, recompute)
