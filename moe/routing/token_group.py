"""Positions of a micro-batch on each rank, and their all-gather.

Context ranks split the positions of a sequence (host/context_parallel.py); under sequence
parallelism tensor ranks split those of a context rank. Expert, data and pipeline parallelism do
not split a micro-batch. S positions x B sequences; shapes are [S, B, ...], or [s, b, ...] for a
rank's part.
"""

from functools import lru_cache

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

from moetron.moe.host.context_parallel import chunks_of_rank


def positions_of_ranks(length: int, tensor_ranks: int, context_ranks: int) -> torch.Tensor:
    """Return the positions on each rank, in its order: int64 [tensor x context ranks, s].

    Ranks are ordered as in megatron-core's group of both: tensor ranks of context rank 0, of 1, ...

    Args:
        length: S, a multiple of 2 x context x tensor ranks (without context ranks: of the latter).
        tensor_ranks: that split a context rank's positions.
        context_ranks: that split the sequence.
    """
    everything = torch.arange(length, device="cpu")
    if context_ranks == 1:
        return everything.view(tensor_ranks, -1)
    chunks = everything.view(2 * context_ranks, -1)
    held = [chunks[list(chunks_of_rank(rank, context_ranks))] for rank in range(context_ranks)]
    return torch.stack(held).view(tensor_ranks * context_ranks, -1)


# Indices stay on the device: to send them from pageable memory at every use would block the host
# until the device has caught up.
@lru_cache(maxsize=8)
def _positions(
    length: int, tensor_ranks: int, context_ranks: int, device: torch.device
) -> torch.Tensor:
    """Return `positions_of_ranks` on ``device``; usable in training also if made in inference."""
    with torch.inference_mode(False):
        return positions_of_ranks(length, tensor_ranks, context_ranks).to(device)


@lru_cache(maxsize=8)
def _order(
    length: int, tensor_ranks: int, context_ranks: int, device: torch.device
) -> torch.Tensor:
    """Return the index that sorts the rows of all ranks by position: int64 [S]."""
    with torch.inference_mode(False):
        return _positions(length, tensor_ranks, context_ranks, device).flatten().argsort()


class TokenGroup:
    """The ranks that split the positions of a micro-batch.

    Args:
        groups: ``tp``, ``cp`` and ``tp_cp`` are read.
        sequence_parallel: whether tensor ranks hold different positions, or the same ones.
    """

    def __init__(self, groups: ProcessGroupCollection, sequence_parallel: bool) -> None:
        self.group = groups.tp_cp if sequence_parallel else groups.cp
        self._context_ranks = groups.cp.size()
        self._tensor_ranks = groups.tp.size() if sequence_parallel else 1
        assert self.group.size() == self._context_ranks * self._tensor_ranks
        assert self.group.rank() // self._tensor_ranks == groups.cp.rank()

    def positions(self, rows: int, device: torch.device) -> torch.Tensor:
        """Return the positions in the sequence of this rank's ``rows``: int64 [s]."""
        return _positions(*self._shape(rows), device)[self.group.rank()]

    def parts_of_sequence(self, rows: int, parts: int, device: torch.device) -> torch.Tensor:
        """Return the number of the part, of ``parts`` equal ones, of each position: int64 [s]."""
        return self.positions(rows, device) * parts // (rows * self.group.size())

    def gather(self, local: torch.Tensor) -> torch.Tensor:
        """Gather all ranks' rows in sequence order, [s, b, ...] to [S, b, ...]; no gradient."""
        if self.group.size() == 1:
            return local.detach()
        # All-gather over TP x CP (CP without sequence parallelism): rows arrive in rank order.
        held = gather_from_sequence_parallel_region(local.detach().contiguous(), group=self.group)
        return held[_order(*self._shape(len(local)), held.device)]

    def own(self, full: torch.Tensor) -> torch.Tensor:
        """Return this rank's rows of [S, ...]."""
        if self.group.size() == 1:
            return full
        return full[self.positions(len(full) // self.group.size(), full.device)]

    def of_context_rank(self, rows_sX: torch.Tensor) -> torch.Tensor:
        """Return this rank's rows of its context rank's [S / C, ...]."""
        return rows_sX.chunk(self._tensor_ranks)[self.group.rank() % self._tensor_ranks]

    def _shape(self, rows: int) -> tuple[int, int, int]:
        """Return the arguments of `positions_of_ranks` for ``rows`` on each rank."""
        return rows * self.group.size(), self._tensor_ranks, self._context_ranks
