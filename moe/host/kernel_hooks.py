"""Our kernels in place of several operations of megatron-core, where they serve."""

import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.distributed import ProcessGroup

from moetron.moe.host.patching import Patch
from moetron.moe.kernels.availability import uses_triton
from moetron.moe.kernels.rotary import PairLayout, rotary


def rotate(
    t: torch.Tensor,
    freqs: torch.Tensor,
    config: TransformerConfig,
    cu_seqlens: torch.Tensor | None = None,
    mscale: float = 1.0,
    cp_group: ProcessGroup | None = None,
    **options: bool,
) -> torch.Tensor:
    """Return what ``rope_utils.apply_rotary_pos_emb`` does; packed sequences are left to it.

    megatron-core 0.19 also passes that a latent attention's pairs are interleaved in memory.
    """
    if (
        cu_seqlens is None
        and freqs.shape[1:3] == (1, 1)
        and not config.apply_rope_fusion
        and uses_triton(t)
    ):
        interleaved = config.rotary_interleaved
        pairs = PairLayout(config.multi_latent_attention or interleaved, interleaved)
        return rotary(t, freqs, pairs, mscale)
    result: torch.Tensor = rope_utils.apply_rotary_pos_emb(
        t, freqs, config, cu_seqlens, mscale, cp_group, **options
    )
    return result


def latent_rotary() -> list[Patch]:
    """Rotate latent attention's queries and keys by one kernel.

    transformer/multi_latent_attention.py:803 and 812 call the function inside a closure, which a
    subclass cannot replace. megatron-core's own kernels need ``apply_rope_fusion`` and YaRN.
    """
    return [Patch(multi_latent_attention, "apply_rotary_pos_emb", rotate)]


HOOKS = {hook.__name__: hook for hook in (latent_rotary,)}
"""Applied on every device; nothing fails without them."""
