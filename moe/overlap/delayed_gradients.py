"""Weight gradients that wait until the schedule asks for them (--delay-wgrad-compute)."""

from collections.abc import Callable

import torch


class DelayedGradients:
    """Mixin of a module whose backward pass can leave out its weights' gradients.

    It follows the protocol of Transformer Engine's modules, which megatron-core's schedule and
    gradient reduction know. A parameter with ``skip_backward_post_hook`` gets no gradient in the
    backward pass; `backward_dw` computes it, then calls the hooks with which megatron-core adds it
    to the main gradient and starts its reduction.
    """

    _waiting: list[tuple[torch.nn.Parameter, Callable[[], torch.Tensor]]] | None = None
    """Gradients to compute, by `backward_dw`; None: nothing is delayed."""

    def delay(self, *weights: torch.nn.Parameter) -> None:
        """Delay the gradients of ``weights`` from now on."""
        self._waiting = []
        self._hooks: list[Callable[[], None]] = []
        for weight in weights:
            weight.skip_backward_post_hook = True  # type: ignore[attr-defined]

    def gradient(
        self, weight: torch.nn.Parameter, compute: Callable[[], torch.Tensor]
    ) -> torch.Tensor | None:
        """Return ``compute()``, or None in a backward pass that leaves it to `backward_dw`."""
        if self._waiting is None:
            return compute()
        self._waiting.append((weight, compute))
        return None

    def register_wgrad_accumulation_and_reduce_hooks(self, hook: Callable[[], None]) -> None:
        """Call ``hook`` at the end of every `backward_dw`; megatron-core passes one a parameter."""
        self._hooks.append(hook)

    @torch.no_grad()
    def backward_dw(self) -> None:
        """Compute the gradients that the last backward pass left out, if any."""
        if not self._waiting:
            return
        for weight, compute in self._waiting:
            gradient = compute()
            weight.grad = gradient if weight.grad is None else weight.grad + gradient
        self._waiting.clear()  # and the activations that they kept
        for hook in self._hooks:
            hook()
