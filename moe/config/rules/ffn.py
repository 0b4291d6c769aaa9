"""Rules on FFN kinds, on options of local grouped experts, and on initialisation."""

from collections.abc import Iterator

from moetron.moe.config.rules.case import Case
from moetron.moe.config.schema import derived
from moetron.moe.config.schema.field import flag_name
from moetron.moe.config.schema.implementation import beyond_transformer_engine

_ALIGNMENT = 8
"""Required divisor of an expert's widths on every rank: 16 bytes of bf16."""
_GROUPED_ONLY = ("ffn_type", "moe_expert_multiplicative_bias", "moe_expert_dropout")
"""Local-only settings that need grouped experts."""


def kinds(case: Case) -> Iterator[str]:
    """Check blocks that megatron-core and Transformer Engine lack."""
    settings = case.settings
    moe, is_double = settings.moe, derived.ffn_type(settings.model) == "double_gated"
    if settings.model.ffn_type is not None and not settings.model.swiglu:
        yield f"--no-swiglu has no effect with {case.given('ffn_type')}: drop it"
    if is_double and settings.model.add_bias_linear:
        yield "--ffn-type double_gated has no biases: use --disable-bias-linear"
    for name in beyond_transformer_engine(settings):
        if name.startswith("moe_") and moe.num_experts is None:
            yield f"{case.given(name)} needs --num-experts: add it or leave this out"
        if not case.local:
            yield (
                f"{case.given(name)} needs --transformer-impl local (or auto, which selects it): "
                "megatron-core's Transformer Engine layers have no such block"
            )
        if name in _GROUPED_ONLY:
            yield from _grouped(case, name)


def _grouped(case: Case, name: str) -> Iterator[str]:
    """Check options of experts that need a grouped GEMM in high precision."""
    settings = case.settings
    if settings.precision.fp8_format is not None:
        yield f"{case.given(name)} is incompatible with {case.given('fp8_format')}: drop one"
    if settings.moe.num_experts is None:
        return
    if not settings.moe.moe_grouped_gemm:
        yield f"{case.given(name)} needs --moe-grouped-gemm"
    yield from unaligned_experts(case, name)


def unaligned_experts(case: Case, name: str, alignment: int = _ALIGNMENT) -> Iterator[str]:
    """Check the widths of grouped experts, which setting ``name`` needs."""
    settings = case.settings
    ranks = derived.expert_tensor_parallel_size(settings.parallel)
    widths = (settings.model.hidden_size, derived.expert_ffn_size(settings) // ranks)
    if any(width % alignment for width in widths):
        yield (
            f"{case.given(name)}: --hidden-size and {flag_name('moe_ffn_hidden_size')} of a rank, "
            f"{widths[0]} and {widths[1]}, must be multiples of {alignment}"
        )


def initialisation(case: Case) -> Iterator[str]:
    """Check initialisation: variance scaling derives a matrix's inputs from one TP size."""
    settings = case.settings
    parallel, is_scaled = settings.parallel, settings.model.init_method == "variance_scaling"
    ranks = derived.expert_tensor_parallel_size(parallel)
    differs = ranks != parallel.tensor_model_parallel_size
    if is_scaled and settings.moe.num_experts is not None and differs:
        yield (
            "--init-method variance_scaling needs --expert-tensor-parallel-size "
            f"{parallel.tensor_model_parallel_size}, the tensor-parallel size"
        )
    folds, latent = settings.model.query_init_folds_scale, settings.attention.multi_latent_attention
    if folds and latent:
        yield "--query-init-folds-scale is incompatible with --multi-latent-attention"
    if settings.moe.moe_router_init_method_std is not None and settings.moe.num_experts is None:
        yield f"{case.given('moe_router_init_method_std')} needs --num-experts: add it or drop this"


RULES = (kinds, initialisation)
