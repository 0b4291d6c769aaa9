"""Norm of each rank's own gradients, before they are reduced: names the rank of a bad value."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel

from moetron.moe.config.schema.settings import Settings


class GradientNorm:
    """Callback of megatron-core's schedules that measures gradients before it finalises them.

    One pass over the gradient buffers, as megatron-core's own check for NaN, but nothing waits for
    the device. Not measured with overlapped reduction, which has begun by then, or without
    --check-for-nan-in-loss-and-grad.
    """

    def __init__(self, finalize: Callable[..., None], measures: bool) -> None:
        self._finalize, self._measures = finalize, measures
        self._square: torch.Tensor | None = None

    @classmethod
    def install(cls, config: Any, settings: Settings) -> "GradientNorm":
        """Wrap the callback of ``config``, once."""
        present = config.finalize_model_grads_func
        finalize = present._finalize if isinstance(present, cls) else present
        measures = settings.training.check_for_nan_in_loss_and_grad
        found = cls(finalize, measures and not settings.parallel.overlap_grad_reduce)
        config.finalize_model_grads_func = found
        return found

    def __call__(self, model: Sequence[DistributedDataParallel], *args: Any, **kwargs: Any) -> None:
        """Measure, then finalise."""
        if self._measures:
            with torch.no_grad():
                norms = [
                    torch.linalg.vector_norm(buffer.grad_data, dtype=torch.float32)
                    for chunk in model
                    for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
                ]
                self._square = torch.stack(norms).square().sum()
        self._finalize(model, *args, **kwargs)

    def take(self) -> torch.Tensor | None:
        """Return the squared norm of the last step, fp32 on the device; None: not measured."""
        square, self._square = self._square, None
        return square
