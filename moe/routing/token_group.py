"""Positions of a micro-batch on each rank, and their all-gather.

Context ranks split the positions of a sequence (host/context_parallel.py); under sequence
parallelism tensor ranks split those of a context rank. Expert, data and pipeline parallelism do
not split a micro-batch. S positions x B sequences; shapes are [S, B, ...], or [s, b, ...] for a
rank's part.
"""

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
    if context_ranks == 1:
        return torch.arange(length).view(tensor_ranks, -1)
    chunks = torch.arange(length).view(2 * context_ranks, -1)
    held = [chunks[list(chunks_of_rank(rank, context_ranks))] for rank in range(context_ranks)]
    return torch.stack(held).view(tensor_ranks * context_ranks, -1)


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

    def positions(self, rows: int) -> torch.Tensor:
        """Return the positions in the sequence of this rank's ``rows``: int64 [s]."""
        return self._all_positions(rows)[self.group.rank()]

    def parts_of_sequence(self, rows: int, parts: int) -> torch.Tensor:
        """Return the number of the part, of ``parts`` equal ones, of each position: int64 [s]."""
        return self.positions(rows) * parts // (rows * self.group.size())

    def gather(self, local: torch.Tensor) -> torch.Tensor:
        """Gather all ranks' rows in sequence order, [s, b, ...] to [S, b, ...]; no gradient."""
        if self.group.size() == 1:
            return local.detach()
        order = self._all_positions(len(local)).flatten().argsort()
        # All-gather over TP x CP (CP without sequence parallelism): rows arrive in rank order.
        held = gather_from_sequence_parallel_region(local.detach().contiguous(), group=self.group)
        return held[order.to(held.device)]

    def own(self, full: torch.Tensor) -> torch.Tensor:
        """Return this rank's rows of [S, ...]."""
        if self.group.size() == 1:
            return full
        return full[self.positions(len(full) // self.group.size()).to(full.device)]

    def of_context_rank(self, rows_sX: torch.Tensor) -> torch.Tensor:
        """Return this rank's rows of its context rank's [S / C, ...]."""
        return rows_sX.chunk(self._tensor_ranks)[self.group.rank() % self._tensor_ranks]

    def _all_positions(self, rows: int) -> torch.Tensor:
        return positions_of_ranks(rows * self.group.size(), self._tensor_ranks, self._context_ranks)
