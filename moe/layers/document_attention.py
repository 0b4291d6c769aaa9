"""Causal attention inside documents, without a mask of S x S pairs.

The sequences of a micro-batch, [B, S] positions in row order, are cut into documents by
``cu_seqlens`` (FlashAttention's name): int32 [D + 1], the end of each document in the flattened
rows, from 0. The end of a sequence is the end of a document. Equal neighbours are empty documents,
with which the loader pads ``cu_seqlens`` to few different lengths.

Shape suffixes: B sequences of S positions, N documents of equal length.
"""

import inspect
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, None, bool], torch.Tensor]
"""Dense attention: query [n, N, heads, width], key, value, no mask, whether causal: queries are the
last positions of the keys."""


_LARGEST_WIDTH = 256
"""Of a head, for FlashAttention."""
OWN_CALL = 64
"""Tokens of a document from which it gets a call of its own: to stack them costs copies."""


class Piece(NamedTuple):
    """Part of a document in a range of positions."""

    queries: int
    """Positions in the range."""
    keys: int
    """The same positions and those of the document before them."""


def document_lengths(cu_seqlens: torch.Tensor, batch: int) -> list[list[int]]:
    """Return the lengths of the documents of each sequence; waits for the device."""
    ends = cu_seqlens.tolist()
    length = ends[-1] // batch
    rows: list[list[int]] = [[] for _ in range(batch)]
    for start, end in pairwise(ends):
        if end > start:
            rows[start // length].append(end - start)
    return rows


def pieces(lengths: Sequence[int], first: int, last: int) -> list[Piece]:
    """Return the parts of a sequence's documents in positions ``[first, last)``."""
    found, start = [], 0
    for length in lengths:
        low, high = max(start, first), min(start + length, last)
        if low < high:
            found.append(Piece(high - low, high - start))
        start += length
    return found


def attend_in_documents(
    attend: Attend,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    ranges: Sequence[tuple[int, int]],
) -> torch.Tensor:
    """Return causal attention inside documents; one call for all short pieces of equal size.

    Exact: a call sees no other document. Its work is the sum of squares of the documents' lengths.
    Tensors are split and joined instead of indexed, because the gradient of each slice would be a
    tensor of the full size.

    Args:
        attend: dense attention.
        query: [s, b, heads, width], the positions of ``ranges`` in their order.
        key: [S, b, heads, width], the full sequences.
        value: like ``key``.
        cu_seqlens: see the module.
        ranges: first and last position (excluded), in ascending order of calls.

    Returns:
        [s, b, heads x width of a value].
    """
    cuts = [
        [pieces(lengths, *each) for each in ranges]
        for lengths in document_lengths(cu_seqlens, query.shape[1])
    ]
    calls: dict[tuple[Piece, int], list[tuple[torch.Tensor, ...]]] = defaultdict(list)
    order: list[list[tuple[tuple[Piece, int], int]]] = []  # by sequence: call, place in the call
    rows = zip(query.unbind(1), key.unbind(1), value.unbind(1), cuts, strict=True)
    for query_row, key_row, value_row, cut in rows:
        order.append([])
        parts = query_row.split([last - first for first, last in ranges])
        for part, (_, last), found in zip(parts, ranges, cut, strict=True):
            sizes = [piece.keys for piece in found]
            outer = [last - sum(sizes), *sizes, len(key_row) - last]
            keys, values = key_row.split(outer)[1:-1], value_row.split(outer)[1:-1]
            queries = part.split([piece.queries for piece in found])
            for piece, *tensors in zip(found, queries, keys, values, strict=True):
                call = piece, 0 if piece.queries < OWN_CALL else len(calls)
                order[-1].append((call, len(calls[call])))
                calls[call].append(tuple(tensors))
    results = {call: _attend_together(attend, call[0], each) for call, each in calls.items()}
    joined = [torch.cat([results[call][place] for call, place in row]) for row in order]
    return torch.stack(joined, dim=1) if len(joined) > 1 else joined[0][:, None]


def _attend_together(
    attend: Attend, piece: Piece, documents: Sequence[tuple[torch.Tensor, ...]]
) -> Sequence[torch.Tensor]:
    """Return the outputs [queries, heads x width] of pieces of one size."""
    if len(documents) == 1:
        query, key, value = (x[:, None] for x in documents[0])
    else:
        query, key, value = (torch.stack(each, dim=1) for each in zip(*documents, strict=True))
    # The first document of a range may begin before it, and have more keys than queries.
    return attend(query, key, value, None, piece.queries > 1).unbind(1)


def varlen_kernel(query: torch.Tensor, value: torch.Tensor) -> Callable[..., Any] | None:
    """Return torch's attention over ``cu_seqlens`` if it serves these tensors, else None.

    FlashAttention: CUDA, 16 bits, a width of keys that is a multiple of 8 and at most 256. The host
    then need not know the lengths.
    """
    width = query.shape[-1]
    fits = width % 8 == 0 and value.shape[-1] <= width <= _LARGEST_WIDTH
    if not query.is_cuda or query.dtype == torch.float32 or not fits:
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # before torch 2.10
        return None
    known = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"scale", "window_size"} <= known.keys() else None


def attend_with_kernel(
    kernel: Callable[..., Any],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Return `attend_in_documents` of full sequences by `varlen_kernel`.

    The kernel needs values as wide as keys: those of latent attention are filled up with zeros.
    """
    length, batch = query.shape[:2]
    width = value.shape[-1]
    if width < query.shape[-1]:  # `pad` by nothing copies
        value = F.pad(value, (0, query.shape[-1] - width))
    rows = [x.transpose(0, 1).flatten(0, 1) for x in (query, key, value)]
    out: torch.Tensor = kernel(
        *rows,
        cu_seqlens,
        cu_seqlens,
        length,  # an upper bound: the longest document would have to come from the device
        length,
        scale=scale,
        window_size=(-1, 0),  # causal
    )
    return out[..., :width].reshape(batch, length, -1).transpose(0, 1)


def places_in_documents(cu_seqlens: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    """Return each position's distance from the start of its document: int64 [b, S]."""
    position = torch.arange(batch * length, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens, position, right=True) - 1
    return (position - cu_seqlens[document]).long().view(batch, length)


def packed_parameters(cu_seqlens: torch.Tensor, length: int) -> PackedSeqParams:
    """Return the documents in megatron-core's form, for Transformer Engine's attention."""
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=length,
        max_seqlen_kv=length,
    )
