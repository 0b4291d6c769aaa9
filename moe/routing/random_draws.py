"""Random numbers for whole micro-batches, so that a layout does not change what a router draws.

Every rank draws the numbers of all tokens of its micro-batch from a generator that is seeded by
(run's seed, layer, number of the micro-batch in the run), and uses those of its own tokens.
"""

import hashlib

import torch
from torch.distributed import ProcessGroup

from moetron.moe.routing.token_group import TokenGroup


def derived_seed(*parts: object) -> int:
    """A seed that depends on all of ``parts``, far from that of any other."""
    digest = hashlib.blake2b(" ".join(map(str, parts)).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little")


class Draws(torch.nn.Module):
    """A router's source of random numbers.

    Micro-batches are numbered as samples are: number m x D + r is the m-th of data-parallel rank r
    of D. Their count is part of the checkpoint. Where activations are recomputed a micro-batch
    passes twice, first without gradient; both passes draw the same.

    Args:
        seed: of the run.
        tokens: which tokens this rank holds.
        dp_group: the D data-parallel ranks.
    """

    micro_batches: torch.Tensor
    """int64 [1]: of the run, that have passed with gradient."""

    def __init__(self, seed: int, tokens: TokenGroup, dp_group: ProcessGroup) -> None:
        super().__init__()
        self._seed = seed
        self._tokens = tokens
        self._dp_rank, self._dp_size = dp_group.rank(), dp_group.size()
        self.number = 0  # of the micro-batch that passes, or passed last
        self._ahead = 0  # passes without gradient that wait for their second pass
        counter = torch.zeros(1, dtype=torch.int64, device=torch.cuda.current_device())
        self.register_buffer("micro_batches", counter)
        self._generator = torch.Generator()

    def start(self, layer: int) -> None:
        """Begin the next training pass of ``layer``."""
        self.number = int(self.micro_batches) + self._dp_rank
        if torch.is_grad_enabled():
            self.micro_batches += self._dp_size
            self._ahead = max(0, self._ahead - 1)
        else:
            self.number += self._dp_size * self._ahead
            self._ahead += 1
        self._generator.manual_seed(derived_seed(self._seed, layer, self.number))

    def uniform(self, like_sbX: torch.Tensor) -> torch.Tensor:
        """From U(0, 1), fp32, for this rank's rows of a micro-batch [S, b, X]."""
        rows, *rest = like_sbX.shape
        shape = (rows * self._tokens.group.size(), *rest)
        whole = torch.rand(shape, generator=self._generator)
        return self._tokens.own(whole).to(like_sbX.device)

    def normal(self, like_sbX: torch.Tensor) -> torch.Tensor:
        """From N(0, 1), likewise."""
        uniform = self.uniform(like_sbX).clamp(1e-7, 1 - 1e-7)
        return torch.special.ndtri(uniform)

    def gumbel(self, like_sbX: torch.Tensor) -> torch.Tensor:
        """From the Gumbel distribution, -log(-log U), likewise."""
        return -(-self.uniform(like_sbX).clamp(1e-20, 1 - 1e-7).log()).log()
