"""Which positions of a sequence a context-parallel rank holds, and how to see all of them.

A sequence of S positions is cut into 2 C chunks for C ranks; rank r holds chunks r and 2 C - 1 - r,
so that every rank has the same work under a causal mask (megatron-core's
``get_batch_on_this_cp_rank``, utils.py:1994).
"""

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch.distributed import ProcessGroup


def chunks_of_rank(rank: int, ranks: int) -> tuple[int, int]:
    """The two chunks, of 2 x ``ranks``, that a rank holds, in the order in which it holds them."""
    return rank, 2 * ranks - 1 - rank


def from_rank_order(ranks: int) -> list[int]:
    """For each chunk of a sequence its place where ranks' chunks stand one after the other."""
    held = [chunk for rank in range(ranks) for chunk in chunks_of_rank(rank, ranks)]
    return [held.index(chunk) for chunk in range(2 * ranks)]


def gather_sequence(local: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """Every rank's positions in the sequence's order.

    One all-gather forward; backward a reduce-scatter sums what all ranks' uses of a position ask.

    Args:
        local: [S / C, ...], this rank's two chunks.
        group: the C context-parallel ranks.

    Returns:
        [S, ...].
    """
    chunks = 2 * group.size()
    gathered = gather_from_sequence_parallel_region(local.contiguous(), group=group)
    by_chunk = gathered.unflatten(0, (chunks, -1))
    order = torch.tensor(from_rank_order(group.size()), device=local.device)
    whole: torch.Tensor = by_chunk.index_select(0, order).flatten(0, 1)
    return whole
