"""Which implementation of the layers a model is built from: ours, or Transformer Engine's."""

from moetron.moe.config.schema import derived
from moetron.moe.config.schema.settings import Settings


def beyond_transformer_engine(settings: Settings) -> list[str]:
    """Names of the settings that ask for blocks which only the local implementation has.

    megatron-core's layer specs of Transformer Engine build the layer without them and say nothing.
    """
    model, moe = settings.model, settings.moe
    asked = {
        "ffn_type": derived.ffn_type(model) == "double_gated",
        "norm_affine": not model.norm_affine,
        "moe_expert_multiplicative_bias": moe.moe_expert_multiplicative_bias,
        "moe_expert_dropout": moe.moe_expert_dropout > 0,
        "moe_sequential_ffn_hidden_size": moe.moe_sequential_ffn_hidden_size is not None,
    }
    return [name for name, is_asked in asked.items() if is_asked]


def is_local(settings: Settings, te: bool) -> bool:
    """Whether layers are ours; ``te``: Transformer Engine and a CUDA device can be used."""
    chosen = settings.model.transformer_impl
    if chosen == "auto":
        return not te or bool(beyond_transformer_engine(settings))
    return chosen == "local"
