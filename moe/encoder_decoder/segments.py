"""Examples that share a sample: their parts of the encoder's and the decoder's tokens.

Ids are int64 [b, S]: 0 is padding, 1, 2, ... are a sample's examples in order. Tokens attend only
to their own example. Shape suffixes: N examples of equal lengths, Q queries and K keys of one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch

Run = tuple[int, int, int]
"""Sample, first position, and length of an example in one stack."""


@dataclass(frozen=True)
class Pairs:
    """Queries and keys of the examples with equal lengths, as rows of [b x S, ...]."""

    query_NQ: torch.Tensor
    key_NK: torch.Tensor


def runs(ids: Sequence[Sequence[int]]) -> dict[tuple[int, int], Run]:
    """Return the run of each (sample, example).

    Raises:
        ValueError: an example is in two pieces.
    """
    found: dict[tuple[int, int], Run] = {}
    for sample, row in enumerate(ids):
        first = 0
        for example, same in groupby(row):
            length = sum(1 for _ in same)
            if example and (sample, example) in found:
                raise ValueError(f"example {example} of sample {sample} is in two pieces")
            if example:
                found[sample, example] = (sample, first, length)
            first += length
    return found


def pairs(
    queries: dict[tuple[int, int], Run],
    query_length: int,
    keys: dict[tuple[int, int], Run],
    key_length: int,
) -> list[Pairs]:
    """Return the examples of ``queries`` with their ``keys``, grouped by lengths, on the CPU.

    Args:
        queries: runs of the stack that attends.
        query_length: positions of a sample there.
        keys: runs of the stack that is attended to.
        key_length: positions of a sample there.
    """
    groups: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for name, (sample, first, length) in queries.items():
        _, first_key, keys_of_it = keys[name]
        rows = (sample * query_length + first, sample * key_length + first_key)
        groups.setdefault((length, keys_of_it), []).append(rows)
    return [
        Pairs(
            _rows([query for query, _ in firsts], length),
            _rows([key for _, key in firsts], keys_of_it),
        )
        for (length, keys_of_it), firsts in groups.items()
    ]


def _rows(firsts: list[int], length: int) -> torch.Tensor:
    return torch.from_numpy(np.array(firsts)[:, None] + np.arange(length))


def _sent(found: dict[str, list[Pairs]], device: torch.device) -> dict[str, list[Pairs]]:
    """Return the pairs on ``device``; one copy, since each costs a GPU more than its bytes."""
    rows = [x for each in found.values() for pair in each for x in (pair.query_NQ, pair.key_NK)]
    if not rows:
        return found
    flat = torch.cat([x.flatten() for x in rows]).to(device, non_blocking=True)
    parts = zip(flat.split([x.numel() for x in rows]), rows, strict=True)
    sent = (part.view(x.shape) for part, x in parts)
    return {name: [Pairs(next(sent), next(sent)) for _ in each] for name, each in found.items()}


@dataclass(frozen=True)
class Segments:
    """Pairs of each attention, padding of each stack, and the longest example of each stack."""

    pairs: dict[str, list[Pairs]]
    """Of "encoder", "decoder" and "cross"."""
    padding: dict[str, torch.Tensor | None]
    """Bool [b, S], True for padding; None: there is none."""
    longest: dict[str, int]


def segments_of(ids_bS: torch.Tensor, lengths: dict[str, int]) -> Segments | None:
    """Return the segments of a micro-batch, None if every sample is one example without padding.

    The host reads the ids: on a GPU it waits for them, once.

    Args:
        ids_bS: examples of the encoder's tokens, then of the decoder's.
        lengths: tokens of a sample in "encoder" and "decoder".
    """
    host_bS, sizes = ids_bS.cpu(), list(lengths.values())
    if bool((host_bS == 1).all()):
        return None
    parts = dict(zip(lengths, ids_bS.split(sizes, dim=1), strict=True))
    rows = {k: part.tolist() for k, part in zip(lengths, host_bS.split(sizes, dim=1), strict=True)}
    found = {stack: runs(of_stack) for stack, of_stack in rows.items()}

    def between(queries: str, keys: str) -> list[Pairs]:
        return pairs(found[queries], lengths[queries], found[keys], lengths[keys])

    attentions = {
        "encoder": between("encoder", "encoder"),
        "decoder": between("decoder", "decoder"),
        "cross": between("decoder", "encoder"),
    }
    return Segments(
        _sent(attentions, ids_bS.device),
        {
            stack: part == 0 if any(0 in row for row in rows[stack]) else None
            for stack, part in parts.items()
        },
        {stack: _longest(found[stack].values()) for stack in parts},
    )


def _longest(found: Iterable[Run]) -> int:
    return max((length for _, _, length in found), default=1)
