"""Queries and keys from a joint projection: split, RMSNorm and rotary embedding in one pass.

Shape suffixes: s positions, b samples, G key heads, r query heads that share a key, D channels of a
head, R <= D of them rotated.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class HeadLayout:
    """What the kernels do with the channels of a head."""

    width: int
    """D."""
    interleaved: bool
    """A pair's channels are 2 i and 2 i + 1; else i and i + R / 2."""
    normed: bool
    """RMSNorm of queries and keys, before the rotation."""
    full_width: bool
    """The norm's mean is over all heads, and its weight [heads x D]; else both are a head's."""
    epsilon: float


TILE = 4096
"""Values that a program holds, at most (a head at least; a norm over all heads: all of them)."""
PROGRAMS = 1024
"""About the parts of a weight's gradient that are summed at the end."""


def _power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


class _QueryKey(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        mixed: torch.Tensor,
        query_weight: torch.Tensor,
        key_weight: torch.Tensor,
        table: torch.Tensor,
        layout: HeadLayout,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        from moetron.moe.kernels import query_key_triton as kernels

        mixed = mixed.contiguous()
        s, b, groups, row = mixed.shape
        shared = row // layout.width - 2
        query, key = (mixed.new_empty(s, b, groups * n, layout.width) for n in (shared, 1))
        first_key, first_value = shared * layout.width, (shared + 1) * layout.width
        for target, first, per_group, weight in (
            (query, 0, shared, query_weight),
            (key, first_key, 1, key_weight),
        ):
            tile = _tile(groups * per_group, layout, values_of_a_thread=16)
            kernels.forward_kernel[(s * b, tile.pop("blocks"))](
                mixed[..., first:],
                target,
                weight,
                table,
                mixed.stride(1),
                row,
                b,
                s,
                layout.epsilon,
                PER_GROUP=per_group,
                ROTATED=table.shape[-1],
                **tile,
            )
        value = mixed[..., first_value:]
        if not layout.normed:  # a copy lets go of the queries and keys before their rotation
            value = value.contiguous()
        ctx.save_for_backward(mixed if layout.normed else None, query_weight, key_weight)
        ctx.table, ctx.layout, ctx.shape = table, layout, mixed.shape
        return query, key, value

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_query: torch.Tensor, grad_key: torch.Tensor, grad_value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, None, None]:
        from moetron.moe.kernels import query_key_triton as kernels

        mixed, *weights = ctx.saved_tensors
        layout: HeadLayout = ctx.layout
        result = grad_query.new_empty(ctx.shape)
        s, b, groups, row = ctx.shape
        shared = row // layout.width - 2
        source = result if mixed is None else mixed
        steps = -(-s * b // PROGRAMS)
        programs = -(-s * b // steps)
        of_weights: list[torch.Tensor | None] = []
        for grad, first, per_group, weight in (
            (grad_query, 0, shared, weights[0]),
            (grad_key, shared * layout.width, 1, weights[1]),
        ):
            grad = grad if grad.stride(-1) == 1 else grad.contiguous()
            heads = groups * per_group
            # Half as many as in the forward pass: it holds twice as many tensors.
            tile = _tile(heads, layout, values_of_a_thread=8)
            size = (programs, heads, layout.width) if layout.normed else (0,)
            parts = grad.new_empty(size, dtype=torch.float32)
            kernels.backward_kernel[(programs, tile.pop("blocks"))](
                grad,
                result[..., first:],
                source[..., first:],
                weight,
                parts,
                ctx.table,
                *grad.stride()[:3],
                row * groups,
                row,
                s * b,
                b,
                s,
                layout.epsilon,
                PER_GROUP=per_group,
                ROTATED=ctx.table.shape[-1],
                STEPS=steps,
                **tile,
            )
            total = parts.sum(0 if layout.full_width else (0, 1)) if layout.normed else None
            of_weights.append(None if total is None else total.flatten().to(weight.dtype))
        result[..., (shared + 1) * layout.width :] = grad_value
        return result, of_weights[0], of_weights[1], None, None


def _tile(heads: int, layout: HeadLayout, values_of_a_thread: int) -> dict[str, Any]:
    """Return the constants of a launch, and its number of blocks of heads."""
    channels, block = _power_of_2(layout.width), _power_of_2(heads)
    is_whole = layout.normed and layout.full_width
    block = block if is_whole else min(block, max(1, TILE // channels))
    warps = block * channels // (32 * values_of_a_thread)
    return {
        "num_warps": min(16, max(1, warps)),
        "blocks": -(-heads // block),
        "ALL_HEADS": heads,
        "WIDTH": layout.width,
        "INTERLEAVED": layout.interleaved,
        "NORMED": layout.normed,
        "FULL": layout.full_width,
        "HEADS": block,
        "CHANNELS": channels,
    }


def query_key(
    mixed: torch.Tensor,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    table: torch.Tensor,
    layout: HeadLayout,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split a joint projection; norm and rotate queries and keys, in fp32 until the end.

    Args:
        mixed: [s, b, G, (r + 2) D]: for each key head its queries, its key and its value.
        query_weight: the norm's, [D] or [G r D]; None without a norm.
        key_weight: [D] or [G D].
        table: of `rotary.rotation_table`, for the s positions.
        layout: see there.

    Returns:
        Queries [s, b, G r, D] and keys [s, b, G, D], contiguous, and values [s, b, G, D].
    """
    assert table.shape[1] == mixed.shape[0] and mixed.shape[-1] % layout.width == 0
    assert layout.normed == (query_weight is not None)
    none = mixed.new_empty(0)
    query, key, value = _QueryKey.apply(
        mixed,
        none if query_weight is None else query_weight,
        none if key_weight is None else key_weight,
        table,
        layout,
    )
    return query, key, value
