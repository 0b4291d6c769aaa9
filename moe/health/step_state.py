"""State besides weights that a step's forward and backward passes change, to run them again."""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from moetron.moe.routing.router import Router


class StepState:
    """Buffers of the model (expert biases, counts of choices), draws of routers, random states.

    Python's, NumPy's and torch's generators are megatron-core's own part (`RerunStateMachine`);
    gradients are cleared at the start of every pass, and what a step records for its metrics is
    taken at the end.

    Args:
        chunks: the model on this rank.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        modules = [module for chunk in chunks for module in chunk.modules()]
        self._chunks = chunks
        self._draws = [m.draws for m in modules if isinstance(m, Router) and m.draws is not None]

    def save(self) -> dict[str, Any]:
        """Return copies."""
        return {
            "buffers": [buffer.clone() for buffer in self._buffers()],
            "draws": [draws.counters() for draws in self._draws],
            "tracker": get_cuda_rng_tracker().get_states(),
        }

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        """Return to the state of `save`."""
        for buffer, before in zip(self._buffers(), state["buffers"], strict=True):
            buffer.copy_(before)
        for draws, counters in zip(self._draws, state["draws"], strict=True):
            draws.restore(counters)
        get_cuda_rng_tracker().set_states(dict(state["tracker"]))

    def _buffers(self) -> list[torch.Tensor]:
        # ``buffers`` of megatron-core's wrapper are those of gradients.
        return [buffer for chunk in self._chunks for _, buffer in chunk.named_buffers()]
