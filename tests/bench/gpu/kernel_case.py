"""What a timed kernel is, and the bench's shapes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shape:
    """A micro-batch: B samples, S positions, width H, A heads, E experts of width F, k a token."""

    device: torch.device
    B: int = 4
    S: int = 4096
    H: int = 2048
    A: int = 16
    head: int = 128
    E: int = 64
    F: int = 1024
    k: int = 8
    V: int = 50304

    @classmethod
    def small(cls, device: torch.device) -> "Shape":
        """Return one for a CPU."""
        return cls(device, 1, 64, 64, 4, 16, 8, 32, 2, 256)

    @property
    def tokens(self) -> int:
        """Return the tokens of a micro-batch."""
        return self.B * self.S

    @property
    def rows(self) -> int:
        """Return the experts' rows of a micro-batch."""
        return self.tokens * self.k

    def random(self, *sizes: int, grad: bool = False) -> torch.Tensor:
        """Return random bf16 values."""
        drawn = torch.randn(*sizes, device=self.device, dtype=torch.bfloat16)
        return drawn.requires_grad_(grad)

    def ends(self) -> torch.Tensor:
        """Return the last row of each expert, int32 [E], of equal loads."""
        numbers = torch.arange(1, self.E + 1, device=self.device, dtype=torch.int32)
        return numbers * (self.rows // self.E)


@dataclass(frozen=True)
class Case:
    """A call to time."""

    name: str
    run: Callable[[], object]
    flops: float = 0.0
    moved_bytes: float = 0.0
    """The least that it reads and writes."""


Group = Callable[[Shape], Iterator[Case]]
"""Prepares its tensors and yields calls; its name is the group's."""


def forward_and_backward(
    name: str,
    function: Callable[[], torch.Tensor],
    inputs: Sequence[torch.Tensor],
    flops: float = 0.0,
    moved_bytes: float = 0.0,
    backward_flops: float = 2.0,
    backward_bytes: float = 1.5,
) -> Iterator[Case]:
    """Yield the forward pass alone and both passes.

    ``backward_flops``, ``backward_bytes``: the backward pass's over the forward pass's.
    """

    def both() -> object:
        out = function()
        return torch.autograd.grad(out, inputs, torch.ones_like(out))

    yield Case(f"{name}, forward", function, flops, moved_bytes)
    total = (flops * (1 + backward_flops), moved_bytes * (1 + backward_bytes))
    yield Case(f"{name}, forward + backward", both, *total)
