"""Random numbers of routers that do not depend on the layout.

Every rank draws the numbers of all tokens of its micro-batch from a generator seeded by (run's
seed, layer, number of the micro-batch in the run), and uses those of its own tokens: no
communication. A GPU draws on the GPU: other numbers than a CPU's, the same in all layouts of one
kind of GPU. Shape suffixes: S positions of the sequence, s of them on this rank, b samples.
"""

import hashlib
from typing import Any

import torch
from torch.distributed import ProcessGroup

from moetron.moe.routing.token_group import TokenGroup


def derived_seed(*parts: object) -> int:
    """Return a 56-bit hash of ``parts`` as a seed."""
    digest = hashlib.blake2b(" ".join(map(str, parts)).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little")


class Draws(torch.nn.Module):
    """Random numbers of one router.

    Micro-batches are numbered like samples: number m x D + r is the m-th of data-parallel rank r of
    D. Their count is part of the checkpoint. With activation recomputation a micro-batch has two
    forward passes, the first without gradient; both draw the same numbers.

    Args:
        seed: of the run.
        tokens: positions of this rank's tokens.
        dp_group: the D data-parallel ranks.
    """

    micro_batches: torch.Tensor
    """int64 [1]: micro-batches of the run whose pass with gradient is done, for checkpoints."""

    def __init__(self, seed: int, tokens: TokenGroup, dp_group: ProcessGroup) -> None:
        super().__init__()
        self._seed = seed
        self._tokens = tokens
        self._dp_rank, self._dp_size = dp_group.rank(), dp_group.size()
        self.done = 0
        """The value of `micro_batches`; reading that from the device would block the host."""
        self.number = 0  # of the current or last micro-batch
        self._ahead = 0  # micro-batches that await their second pass
        counter = torch.zeros(1, dtype=torch.int64, device=torch.cuda.current_device())
        self.register_buffer("micro_batches", counter)
        self._generator = torch.Generator()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.done = 0 if self.micro_batches.is_meta else int(self.micro_batches)

    def counters(self) -> tuple[int, int, int]:
        """Return the position among micro-batches, for `restore`; the buffer is separate."""
        return self.done, self.number, self._ahead

    def restore(self, counters: tuple[int, int, int]) -> None:
        """Return to an earlier position: a step is run again."""
        self.done, self.number, self._ahead = counters

    def start(self, layer: int) -> None:
        """Begin the next training pass of ``layer``."""
        self.number = self.done + self._dp_rank
        if torch.is_grad_enabled():
            self.done += self._dp_size
            self.micro_batches += self._dp_size
            self._ahead = max(0, self._ahead - 1)
        else:
            self.number += self._dp_size * self._ahead
            self._ahead += 1
        device = self.micro_batches.device
        if self._generator.device != device:
            self._generator = torch.Generator(device)
        self._generator.manual_seed(derived_seed(self._seed, layer, self.number))

    def uniform(self, like_sbX: torch.Tensor) -> torch.Tensor:
        """Return U(0, 1) numbers, fp32, for this rank's rows of a micro-batch [S, b, X]."""
        rows, *rest = like_sbX.shape
        shape = (rows * self._tokens.group.size(), *rest)
        full = torch.rand(shape, generator=self._generator, device=self._generator.device)
        return self._tokens.own(full)

    def normal(self, like_sbX: torch.Tensor) -> torch.Tensor:
        """Return N(0, 1) numbers, likewise."""
        uniform = self.uniform(like_sbX).clamp(1e-7, 1 - 1e-7)
        return torch.special.ndtri(uniform)

    def gumbel(self, like_sbX: torch.Tensor) -> torch.Tensor:
        """Return Gumbel-distributed numbers, -log(-log U), likewise."""
        return -(-self.uniform(like_sbX).clamp(1e-20, 1 - 1e-7).log()).log()
