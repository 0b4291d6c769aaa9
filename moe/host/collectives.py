"""Collectives that gloo lacks, built from those that it has."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.distributed import ProcessGroup


def gather_uneven(
    rows: torch.Tensor, group: ProcessGroup, sizes: Sequence[int], out: torch.Tensor
) -> torch.Tensor:
    """Concatenate the ranks' rows, ``sizes[r]`` of rank r, into ``out``.

    gloo gathers only equal shapes, so every rank pads its rows to the longest.

    Args:
        rows: [sizes[rank], ...] of this rank.
        group: the process group.
        sizes: number of rows of every rank.
        out: [sum(sizes), ...], written and returned.
    """
    longest = max(sizes)
    padded = rows.new_zeros(longest, *rows.shape[1:])
    padded[: len(rows)] = rows
    gathered = rows.new_empty(longest * len(sizes), *rows.shape[1:])
    torch.distributed.all_gather_into_tensor(gathered, padded, group=group)
    pieces = [piece[:size] for piece, size in zip(gathered.split(longest), sizes, strict=True)]
    return torch.cat(pieces, out=out)


def allow_uneven(gather: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return megatron-core's ``_gather_along_first_dim`` with `gather_uneven` for unequal sizes."""

    def gather_along_first_dim(
        input_: torch.Tensor,
        group: ProcessGroup,
        output_split_sizes: Sequence[int] | None = None,
        use_global_buffer: bool = False,
    ) -> torch.Tensor:
        if output_split_sizes is None or len(set(output_split_sizes)) == 1:
            options: dict[str, Any] = {"use_global_buffer": use_global_buffer}
            return gather(input_, group, output_split_sizes, **options)
        out = input_.new_empty(sum(output_split_sizes), *input_.shape[1:])
        return gather_uneven(input_, group, output_split_sizes, out)

    return gather_along_first_dim
