"""AdamW that reads and writes every number once."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from moetron.moe.kernels.availability import triton_is_installed

if triton_is_installed():
    from moetron.moe.optim import one_pass_adamw_triton


class OnePassAdamW(torch.optim.AdamW):
    """AdamW of torch, for fp32 parameters, with what precedes and follows it in the same kernel.

    A step scales the gradient by `grad_factor` (clipping), updates moments and parameter, and
    writes the parameter's copy in the model's dtype: 30 bytes of traffic a parameter, where
    clipping, AdamW and copying one after the other move 42. State and options are torch's, except
    that step counters are on the CPU.

    Args:
        params: groups with ``lr`` and ``weight_decay``.
        copies: model parameters of a narrower dtype by their fp32 parameter; contiguous.
        adamw: further arguments of AdamW.
    """

    def __init__(
        self, params: Iterable[dict[str, Any]], copies: Mapping[Tensor, Tensor], **adamw: Any
    ) -> None:
        super().__init__(params, **adamw)
        self._copies = dict(copies)
        self.grad_factor = 1.0
        """Of the gradients of the next step; 1 again after it."""
        self.copied = False
        """Whether copies are up to date; to be cleared by their reader."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        self.grad_factor, self.copied = 1.0, bool(self._copies)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, grad, copy = self.state[parameter], parameter.grad, self._copies.get(parameter)
        for name in ("exp_avg", "exp_avg_sq"):
            if name not in state:
                state[name] = torch.zeros_like(parameter)
        state["step"] = state.get("step", torch.zeros(())) + 1
        count, (beta1, beta2), rate = float(state["step"]), group["betas"], group["lr"]
        factors = (
            self.grad_factor,
            1 - rate * group["weight_decay"],
            beta1,
            beta2,
            rate / (1 - beta1**count),
            1 / math.sqrt(1 - beta2**count),
            group["eps"],
        )
        assert grad is not None and parameter.is_contiguous()
        moments = (state["exp_avg"], state["exp_avg_sq"])
        one_pass_adamw_triton.update(parameter, grad.contiguous(), *moments, copy, factors)
