"""Parameters whose optimizer state is split over data-parallel ranks, gathered for a checkpoint."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """The part ``[start, end)`` of a flattened parameter that this rank of ``group`` holds."""

    group: dist.ProcessGroup
    start: int
    end: int
    first_rank: int
    """Rank in the group that holds the parameter's first element and writes the parameter."""
    last_rank: int
    """Rank in the group that holds the parameter's last element."""
    shard: int
    """Elements of the buffer per rank."""
    offset: int
    """Index of the parameter's first element in the first rank's shard."""

    @property
    def is_split(self) -> bool:
        """Return whether several ranks hold parts of the parameter."""
        return self.first_rank != self.last_rank

    def numel_of(self, rank: int, numel: int) -> int:
        """Return how many of a parameter's ``numel`` elements ``rank`` holds."""
        low = (rank - self.first_rank) * self.shard - self.offset
        return min(numel, low + self.shard) - max(0, low)


def gathered(tensors: list[Tensor], span: Span, parameter: Tensor) -> list[Tensor]:
    """Return full tensors on the span's first rank, none elsewhere.

    Those of a parameter that several ranks hold are on the CPU: on a device, all of them would take
    as much memory again as the optimizer until they are written.

    Args:
        tensors: this rank's parts, fp32 [end - start] each.
        span: their place in the parameter.
        parameter: gives the full shape.
    """
    if not span.is_split:
        return [tensor.view(parameter.shape) for tensor in tensors]
    pieces = torch.stack(tensors).to(parameter.device)  # offloaded: NCCL sends from the device
    if span.group.rank() != span.first_rank:
        _exchange(dist.P2POp(dist.isend, pieces, group=span.group, group_peer=span.first_rank))
        return []
    full = torch.empty(len(pieces), parameter.numel(), dtype=pieces.dtype)
    end = pieces.shape[1]
    full[:, :end] = pieces
    for rank in range(span.first_rank + 1, span.last_rank + 1):  # the device holds one part
        part = pieces.new_empty(len(pieces), span.numel_of(rank, parameter.numel()))
        _exchange(dist.P2POp(dist.irecv, part, group=span.group, group_peer=rank))
        start, end = end, end + part.shape[1]
        full[:, start:end] = part
    return [tensor.view(parameter.shape) for tensor in full.unbind()]


def _exchange(operation: dist.P2POp) -> None:
    # Point-to-point within the data-parallel group (experts: theirs): only ranks that hold a part
    # of the parameter take part, all of them in the order of `mains`. As a batch, for NCCL: a plain
    # send would make a communicator of its two ranks, about 100 MB of device memory for good, and
    # a large parameter is split over all ranks of the group. The group's communicator exists since
    # the first step's gradients were reduced.
    for work in dist.batch_isend_irecv([operation]):
        work.wait()
