"""Choice of layer implementation: local or Transformer Engine."""

from typing import Literal

from moetron.moe.config.schema import derived
from moetron.moe.config.schema.settings import Settings


def beyond_transformer_engine(settings: Settings) -> list[str]:
    """Return the names of settings that only the local implementation supports.

    megatron-core's Transformer Engine layer specs silently build the layer without them.
    """
    model, moe = settings.model, settings.moe
    used = {
        "ffn_type": derived.ffn_type(model) == "double_gated",
        "encoder_num_layers": model.encoder_num_layers is not None,
        "norm_affine": not model.norm_affine,
        "moe_expert_multiplicative_bias": moe.moe_expert_multiplicative_bias,
        "moe_expert_dropout": moe.moe_expert_dropout > 0,
        "moe_sequential_ffn_hidden_size": moe.moe_sequential_ffn_hidden_size is not None,
    }
    return [name for name, is_used in used.items() if is_used]


def is_local(settings: Settings, te: bool) -> bool:
    """Return whether layers are local; ``te``: Transformer Engine and a GPU are usable."""
    chosen = settings.model.transformer_impl
    if chosen == "auto":
        return not te or bool(beyond_transformer_engine(settings))
    return chosen == "local"


def experts_impl(settings: Settings, local: bool) -> Literal["grouped_mm", "te", "sequential"]:
    """Return the implementation of experts in local or Transformer Engine's layers.

    Local layers fall back to sequential experts where grouped ones do not support the model.
    """
    moe = settings.moe
    if not moe.moe_grouped_gemm:
        return "sequential"
    if moe.moe_experts_impl == "auto":
        return "grouped_mm" if local or _stacked_experts_fit(settings) else "te"
    return moe.moe_experts_impl


def _stacked_experts_fit(settings: Settings) -> bool:
    """Return whether layers of Transformer Engine can have experts with one stacked weight."""
    ranks = derived.expert_tensor_parallel_size(settings.parallel)
    widths = (settings.model.hidden_size, derived.expert_ffn_size(settings) // ranks)
    return (
        settings.precision.fp8_format is None
        and all(width % 8 == 0 for width in widths)  # rows of 16 bytes in bf16
        and "moe_act" not in (settings.parallel.recompute_modules or [])
    )
