"""Activation of experts with FP8 results: the operands of the products that follow it.

The numbers are quantised as they are computed, in float32, where a kernel does both.
"""

import torch

from moetron.moe.kernels.activation import IN_KERNELS, Activation
from moetron.moe.kernels.availability import triton_is_installed
from moetron.moe.kernels.fp8_rows import Fp8Rows, empty, quantize_rows, rounded

if triton_is_installed():
    from moetron.moe.kernels import scaled_activation_triton


def forward(activation: Activation, hidden: torch.Tensor, weight_R: torch.Tensor) -> Fp8Rows:
    """Return the weighted activation [R, F]; see ``Activation.forward``."""
    if not _has_kernel(activation, hidden):
        return quantize_rows(activation.forward(hidden, weight_R))
    width = hidden.shape[1] // (2 if activation.gated else 1)
    written = empty((len(hidden), width), hidden.device)
    number = IN_KERNELS[activation.function]
    scaled_activation_triton.forward(hidden, weight_R, number, activation.gated, *written)
    return rounded(written)


def backward(
    activation: Activation, grad_RF: torch.Tensor, hidden: torch.Tensor, weight_R: torch.Tensor
) -> tuple[torch.Tensor, Fp8Rows, torch.Tensor, torch.Tensor]:
    """Return the gradient of ``hidden`` twice, that of ``weight_R``, and the activation.

    Only the second of the four is in FP8; see ``Activation.backward``.
    """
    if not _has_kernel(activation, hidden):
        grad_hidden, grad_weight_R, out_RF = activation.backward(grad_RF, hidden, weight_R)
        return grad_hidden, quantize_rows(grad_hidden), grad_weight_R, out_RF
    written = empty(hidden.shape, hidden.device)
    number = IN_KERNELS[activation.function]
    grad_hidden, grad_weight_R, out_RF = scaled_activation_triton.backward(
        grad_RF, hidden, weight_R, number, activation.gated, *written
    )
    return grad_hidden, rounded(written), grad_weight_R, out_RF


def _has_kernel(activation: Activation, hidden: torch.Tensor) -> bool:
    return len(hidden) > 0 and activation.has_kernel(hidden)
