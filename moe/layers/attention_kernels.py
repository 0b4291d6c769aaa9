"""Order in which ``scaled_dot_product_attention`` tries its CUDA kernels.

cuDNN's is the fastest on an H100, but plans every new shape for tens of milliseconds: for training,
whose shapes repeat, and not for generation, nor for documents, each with a length of its own. It
serves bf16 with and without a mask; flash serves bf16 without a mask and with equal widths of keys
and values; efficient also serves fp32, masks and unequal widths (latent attention); math serves
everything and keeps the s x s matrix.

Under ``torch.use_deterministic_algorithms(True)`` (not ``warn_only``) torch gives flash and
efficient attention backward passes with equal bits from run to run, and refuses cuDNN's. Math
attention has them always. Without it only the forward passes repeat.
"""

from contextlib import ExitStack

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import CausalBias, CausalVariant

WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
WITH_CUDNN = [SDPBackend.CUDNN_ATTENTION, *WITHOUT_CUDNN]

_preference = ExitStack()


def preferred() -> list[SDPBackend]:
    """Return the kernels for training by preference; each serves what those before do not."""
    return WITHOUT_CUDNN if torch.are_deterministic_algorithms_enabled() else WITH_CUDNN


def prefer(kernels: list[SDPBackend]) -> None:
    """Set the order for the whole process; a context manager for every call would cost its time."""
    reset_preference()
    _preference.enter_context(sdpa_kernel(kernels, set_priority=True))


def reset_preference() -> None:
    """Return to torch's order."""
    _preference.close()


def causal_mask(queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """Return the allowed pairs of the last ``queries`` of ``keys`` positions, causally.

    On a GPU torch's sign for it, which flash and efficient attention compute. The mask itself would
    be kept for the backward pass, by every layer: gigabytes for long sequences.
    """
    if device.type == "cuda":
        # Not torch's ``causal_lower_right``, which takes (uninitialised) host memory of this shape.
        sign = torch.empty(0, device="cpu").as_subclass(CausalBias)
        sign.variant, sign.seq_len_q, sign.seq_len_kv = CausalVariant.LOWER_RIGHT, queries, keys
        return sign
    allowed = torch.ones(queries, keys, dtype=torch.bool, device=device)
    return allowed.tril(keys - queries)
