"""Number formats."""

from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from moetron.moe.config.schema.field import Group, negative_flag
from moetron.moe.config.schema.roles import Role


class PrecisionSettings(Group):
    """Number formats."""

    default_role = Role.TRAINING

    bf16: bool = negative_flag(False, "fp32")
    """bfloat16 parameters with fp32 main parameters and gradients; otherwise all fp32."""
    accumulate_allreduce_grads_in_fp32: bool = True
    """Accumulate and reduce gradients in fp32."""
    fp8_format: Literal["e4m3", "hybrid"] | None = None
    """FP8 products in linear layers and experts, e4m3 throughout or with e5m2 gradients (hybrid):
    Transformer Engine's, or emulated by the local implementation. Unset: none."""
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "delayed"
    """What shares an FP8 scale: a tensor (delayed: from earlier amaxes; tensorwise: its own), 1x128
    activations and 128x128 weights (blockwise), or 32 values (mxfp8)."""
    fp8_margin: NonNegativeInt = 0
    """Delayed scaling: divide scales by 2^margin."""
    fp8_amax_history_len: PositiveInt = 1
    """Delayed scaling: amaxes that are remembered."""
    fp8_amax_compute_algo: Literal["most_recent", "max"] = "most_recent"
    """Delayed scaling: which remembered amax makes the scale."""
    fp8_param_gather: bool = False
    """Keep Transformer Engine's weights in FP8 and gather them so; main parameters stay fp32."""
    first_last_layers_bf16: bool = False
    """Keep the first and last layers out of FP8."""
    num_layers_at_start_in_bf16: NonNegativeInt = 1
    """First layers that --first-last-layers-bf16 keeps."""
    num_layers_at_end_in_bf16: NonNegativeInt = 1
    """Last layers that --first-last-layers-bf16 keeps."""
