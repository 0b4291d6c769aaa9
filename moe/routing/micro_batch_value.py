"""A tensor per micro-batch that routers get from outside their layer."""

from collections import deque

import torch


class MicroBatchValue:
    """A tensor per micro-batch that a router's forward pass needs.

    With activation recomputation a micro-batch has two forward passes, the first without gradient,
    and others may run in between: values of first passes are queued.
    """

    def __init__(self) -> None:
        self._value: torch.Tensor | None = None
        self._waiting: deque[torch.Tensor | None] = deque()

    def set_next(self, value: torch.Tensor | None) -> None:
        """Set the value of the next micro-batch."""
        self._value = value

    def take(self, training: bool) -> torch.Tensor | None:
        """Return the value of the current micro-batch; call it once per forward pass."""
        if training and not torch.is_grad_enabled():
            self._waiting.append(self._value)
        elif training and self._waiting:
            return self._waiting.popleft()
        return self._value
