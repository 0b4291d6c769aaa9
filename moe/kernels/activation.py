"""Activation of experts: act(gate) x up x token weight, or act(hidden) x token weight.

R rows, F inner width; ``hidden`` is [R, 2F] (gate before up) if gated, else [R, F].
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from moetron.moe.kernels.availability import triton_is_installed, uses_triton

if triton_is_installed():
    from moetron.moe.kernels import activation_triton

IN_KERNELS: dict[Callable[..., torch.Tensor], int] = {F.silu: 0, F.gelu: 1, F.relu: 2}
"""Activation functions that the kernels know, and their numbers there."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Activation:
    """Kind of activation."""

    function: Callable[[torch.Tensor], torch.Tensor]
    gated: bool

    def inner(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the activation [R, F] without weights, in torch operations; differentiable."""
        if not self.gated:
            return self.function(hidden)
        gate, up = hidden.chunk(2, dim=-1)
        return self.function(gate) * up

    def forward(self, hidden: torch.Tensor, weight_R: torch.Tensor) -> torch.Tensor:
        """Return the weighted activation [R, F] in the dtype of ``hidden``."""
        if self.has_kernel(hidden):
            number = IN_KERNELS[self.function]
            return activation_triton.forward(hidden, weight_R, number, self.gated)
        return (self.inner(hidden) * weight_R.unsqueeze(-1)).to(hidden.dtype)

    def backward(
        self, grad_RF: torch.Tensor, hidden: torch.Tensor, weight_R: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the gradients of ``hidden`` and ``weight_R``, and the activation once more."""
        if self.has_kernel(hidden):
            number = IN_KERNELS[self.function]
            return activation_triton.backward(grad_RF, hidden, weight_R, number, self.gated)
        leaves = (hidden.detach().requires_grad_(), weight_R.detach().requires_grad_())
        with torch.enable_grad():
            activated = self.forward(*leaves)
        grad_hidden, grad_weight_R = torch.autograd.grad(activated, leaves, grad_RF)
        return grad_hidden, grad_weight_R, activated.detach()

    def has_kernel(self, hidden: torch.Tensor) -> bool:
        """Return whether `forward` and `backward` run in the kernels."""
        known = self.function in IN_KERNELS and hidden.dtype in _DTYPES
        return known and uses_triton(hidden)
