"""Bugs of megatron-core 0.16.1 that any device meets, patched wherever they are.

Paths in docstrings are below ``megatron/core``. Each function returns no patch where Transformer
Engine is present, since the faulty code is then not reached or right.
"""

from megatron.core.tensor_parallel import random as parallel_random
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.moe import moe_utils

from moetron.moe.host.patching import Patch


def latent_attention() -> list[Patch]:
    """Build latent attention without asking for Transformer Engine's classes.

    transformer/multi_latent_attention.py:184 calls ``isinstance`` with a mock that the import in
    line 54 takes for a class.
    """
    present = isinstance(multi_latent_attention.TELinear, type)
    return [] if present else [Patch(multi_latent_attention, "HAVE_TE", False)]


def router_gemm() -> list[Patch]:
    """Define the Transformer Engine GEMM that the router asks for as absent.

    transformer/moe/moe_utils.py:1192 and 1225 read ``te_general_gemm``, which the failed import in
    line 24 leaves undefined.
    """
    present = hasattr(moe_utils, "te_general_gemm")
    return [] if present else [Patch(moe_utils, "te_general_gemm", None)]


def discarded_outputs() -> list[Patch]:
    """Recompute norms (--recompute-modules layernorm) without asking Transformer Engine for FP8.

    tensor_parallel/random.py:637 takes its own default, ``fp8=False``, for FP8, since it is not
    None; called so by transformer/transformer_layer.py:577 and 672. With Transformer Engine the
    default stays: its contexts then exist, and FP8 layers need them.
    """
    if parallel_random.HAVE_TE:
        return []
    made = parallel_random.CheckpointWithoutOutput.__init__
    return [Patch(made, "__defaults__", (None,))]


FIXES = (
    latent_attention,
    router_gemm,
    discarded_outputs,
)
"""Applied on every device."""
