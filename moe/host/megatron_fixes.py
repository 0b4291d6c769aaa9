"""Patches of bugs in megatron-core on every device.

Paths in docstrings are relative to ``megatron/core``, lines those of 0.16.1 unless another version
is named. Each function returns no patch where the
faulty code is correct or not reached.
"""

import copy
import functools
from typing import Any

from megatron.core.models.gpt import gpt_model
from megatron.core.tensor_parallel import layers
from megatron.core.tensor_parallel import random as parallel_random
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.moe import moe_utils

from moetron.moe.host.patching import Patch
from moetron.moe.megatron.version_differences import add_prediction_losses, present


def latent_attention() -> list[Patch]:
    """Build latent attention without Transformer Engine's classes.

    transformer/multi_latent_attention.py:184 of 0.16.1 calls ``isinstance`` with a mock, imported
    as a class in line 54.
    """
    if isinstance(multi_latent_attention.TELinear, type | None):
        return []
    return [Patch(multi_latent_attention, "HAVE_TE", False)]


def router_gemm() -> list[Patch]:
    """Define the router's Transformer Engine GEMM as None.

    transformer/moe/moe_utils.py:1192 and 1225 read ``te_general_gemm``, which is undefined after
    the failed import in line 24.
    """
    if present(moe_utils, "te_general_gemm"):
        return []
    return [Patch(moe_utils, "te_general_gemm", None)]


def discarded_outputs() -> list[Patch]:
    """Recompute norms (--recompute-modules layernorm) without Transformer Engine's FP8.

    tensor_parallel/random.py:637 treats its default, ``fp8=False``, as FP8, since it is not None;
    callers: transformer/transformer_layer.py:577 and 672. With Transformer Engine the default
    remains: its contexts then exist, and FP8 layers need them.
    """
    if parallel_random.HAVE_TE:
        return []
    made = parallel_random.CheckpointWithoutOutput.__init__
    return [Patch(made, "__defaults__", (None,))]


def output_layer() -> list[Patch]:
    """Build the output layer without apex's fused gradient accumulation, which only it needs.

    tensor_parallel/layers.py:924 refuses ``gradient_accumulation_fusion`` without apex, also where
    all other linear layers are Transformer Engine's, which bring that fusion.
    """
    if layers._grad_accum_fusion_available:
        return []
    made = layers.ColumnParallelLinear.__init__

    @functools.wraps(made)
    def without_fusion(self: Any, *args: Any, config: Any, **kwargs: Any) -> None:
        if config.gradient_accumulation_fusion:
            config = copy.copy(config)
            config.gradient_accumulation_fusion = False
        made(self, *args, config=config, **kwargs)

    return [Patch(layers.ColumnParallelLinear, "__init__", without_fusion)]


def prediction_losses() -> list[Patch]:
    """Weigh the losses of multi-token prediction in every version and layout alike.

    models/gpt/gpt_model.py:701 of 0.19; see `add_prediction_losses`.
    """
    if not present(gpt_model, "process_mtp_loss"):
        return []
    return [Patch(gpt_model, "process_mtp_loss", add_prediction_losses)]


FIXES = (
    latent_attention,
    router_gemm,
    discarded_outputs,
    output_layer,
    prediction_losses,
)
"""Applied on every device."""
