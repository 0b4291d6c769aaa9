"""Sharding of sequences over context-parallel ranks, and gathering of all positions.

A sequence of S positions is split into 2 C chunks for C ranks; rank r holds chunks r and
2 C - 1 - r, so that every rank has the same work under a causal mask (as in megatron-core's
``get_batch_on_this_cp_rank``, whose positional arguments differ between versions).
"""

from functools import lru_cache

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch.distributed import ProcessGroup


def chunks_of_rank(rank: int, ranks: int) -> tuple[int, int]:
    """Return the two chunks, of 2 x ``ranks``, of a rank, in its order."""
    return rank, 2 * ranks - 1 - rank


def from_rank_order(ranks: int) -> list[int]:
    """Return for each chunk of a sequence its index in the concatenation of all ranks' chunks."""
    held = [chunk for rank in range(ranks) for chunk in chunks_of_rank(rank, ranks)]
    return [held.index(chunk) for chunk in range(2 * ranks)]


# On the device: to send a list at every use would block the host until the device has caught up.
@lru_cache(maxsize=8)
def _sequence_order(ranks: int, device: torch.device) -> torch.Tensor:
    """Return `from_rank_order` as a tensor; usable in training also if made in inference."""
    with torch.inference_mode(False):
        return torch.tensor(from_rank_order(ranks), device=device)


def own_chunks(whole: torch.Tensor, axis: int, group: ProcessGroup) -> torch.Tensor:
    """Return this rank's two chunks of the axis of ``whole`` that holds all S positions."""
    ranks = group.size()
    if ranks == 1:
        return whole
    chunks = whole.chunk(2 * ranks, dim=axis)
    return torch.cat([chunks[chunk] for chunk in chunks_of_rank(group.rank(), ranks)], dim=axis)


def gather_sequence(local: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """Return all ranks' positions in sequence order.

    Forward is an all-gather; backward is a reduce-scatter that sums gradients from all ranks.

    Args:
        local: [S / C, ...], this rank's two chunks.
        group: the C context-parallel ranks.

    Returns:
        [S, ...].
    """
    chunks = 2 * group.size()
    gathered = gather_from_sequence_parallel_region(local.contiguous(), group=group)
    by_chunk = gathered.unflatten(0, (chunks, -1))
    order = _sequence_order(group.size(), local.device)
    sequence: torch.Tensor = by_chunk.index_select(0, order).flatten(0, 1)
    return sequence
