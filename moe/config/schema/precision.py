"""Precision settings."""

from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from moetron.moe.config.schema.field import Group, negative_flag
from moetron.moe.config.schema.roles import Role


class PrecisionSettings(Group):
    """Number formats of parameters, gradients and matrix products."""

    default_role = Role.TRAINING

    bf16: bool = negative_flag(False, "fp32")
    """Use bfloat16 parameters with fp32 main parameters and gradients; otherwise all fp32."""
    accumulate_allreduce_grads_in_fp32: bool = True
    """Accumulate and reduce gradients in fp32."""
    fp8_format: Literal["e4m3", "hybrid"] | None = None
    """FP8 format of matrix products in linear layers and experts, e4m3 throughout or with e5m2
    gradients (hybrid): Transformer Engine's, torch's or emulated (docs/fp8.md). Unset: none."""
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "delayed"
    """Granularity of FP8 scales: a tensor (delayed: from earlier amaxes; tensorwise: its own, in
    torch's products one for each token and channel), 1x128 activations and 128x128 weights
    (blockwise), or 32 values (mxfp8)."""
    fp8_margin: NonNegativeInt = 0
    """Delayed scaling: divide scales by 2^margin."""
    fp8_amax_history_len: PositiveInt = 1
    """Delayed scaling: length of the amax history."""
    fp8_amax_compute_algo: Literal["most_recent", "max"] = "most_recent"
    """Delayed scaling: amax of the history that sets the scale."""
    fp8_param_gather: bool = False
    """Keep and all-gather Transformer Engine's weights in FP8; main parameters stay fp32."""
    first_last_layers_bf16: bool = False
    """Run the first and last layers in bfloat16."""
    num_layers_at_start_in_bf16: NonNegativeInt = 1
    """First layers in bfloat16 with --first-last-layers-bf16."""
    num_layers_at_end_in_bf16: NonNegativeInt = 1
    """Last layers in bfloat16 with --first-last-layers-bf16."""
