"""Rotary position embedding in one read and one write.

A head's first R channels are R / 2 pairs; pair i of position s is rotated by an angle of its own,
(x, y) -> (x cos - y sin, y cos + x sin). The channels of pair i are i and i + R / 2 (halves), or
2 i and 2 i + 1 (interleaved). Latent attention reads interleaved pairs and writes halves.
"""

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

_tables = WeakTensorKeyDictionary()
"""Angles -> cosines and sines: megatron-core keeps the angles of a sequence length."""


class PairLayout(NamedTuple):
    """Whether the two channels of a pair are neighbours, before and after the rotation."""

    source_interleaved: bool
    target_interleaved: bool


TILE = 2048
"""Pairs that a program holds in registers, at most (a head's pairs at least)."""


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, table: torch.Tensor, layout: PairLayout) -> torch.Tensor:
        ctx.table, ctx.layout = table, layout
        return _rotate(x, table, layout, layout.target_interleaved, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        # The inverse rotation, from the result's layout to the argument's.
        source_interleaved, target_interleaved = ctx.layout
        back = PairLayout(target_interleaved, source_interleaved)
        return _rotate(grad, ctx.table, back, target_interleaved, -1.0), None, None


def _power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _rotate(
    x: torch.Tensor, table: torch.Tensor, layout: PairLayout, table_interleaved: bool, sign: float
) -> torch.Tensor:
    from moetron.moe.kernels import rotary_triton as kernels

    x = x if x.stride(-1) == 1 else x.contiguous()
    length, samples, heads, width = x.shape
    rotated = table.shape[-1]
    target = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    pairs = _power_of_2(rotated // 2)
    block = min(_power_of_2(heads), max(1, TILE // pairs))
    source_step, source_gap = (2, 1) if layout.source_interleaved else (1, rotated // 2)
    target_step, target_gap = (2, 1) if layout.target_interleaved else (1, rotated // 2)
    kernels.rotary_kernel[(length * samples, -(-heads // block))](
        x,
        target,
        table,
        x.stride(0),
        x.stride(1),
        x.stride(2),
        samples,
        heads,
        length,
        sign,
        WIDTH=width,
        ROTATED=rotated,
        SOURCE_STEP=source_step,
        SOURCE_GAP=source_gap,
        TARGET_STEP=target_step,
        TARGET_GAP=target_gap,
        ANGLE_STEP=2 if table_interleaved else 1,
        HEADS=block,
        PAIRS=pairs,
        REST=_power_of_2(max(1, width - rotated)),
    )
    return target


def rotation_table(angles: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Return cosines and sines x ``scale``, fp32 [2, s, R]; computed once for all layers.

    Args:
        angles: fp32 [s, 1, 1, R]: each pair's angle twice, in the places of its channels.
        scale: YaRN's mscale, the same in every call.
    """
    if angles not in _tables:
        assert angles.shape[1:3] == (1, 1)
        flat = angles.detach().float().flatten(1)
        _tables[angles] = torch.stack([flat.cos(), flat.sin()]).mul_(scale)
    table: torch.Tensor = _tables[angles]
    return table


def rotary(
    x: torch.Tensor, angles: torch.Tensor, layout: PairLayout, scale: float = 1.0
) -> torch.Tensor:
    """Rotate the first channels of every head; computed in fp32, in the dtype of ``x``.

    Args:
        x: [s, b, heads, width]; any strides, so also a slice of a joint projection.
        angles: fp32 [s, 1, 1, R], R <= width and even: each pair's angle twice, in the places that
            its channels have after the rotation.
        layout: places of a pair's channels.
        scale: factor of cosine and sine (YaRN's mscale).

    Returns:
        Contiguous [s, b, heads, width].
    """
    assert len(angles) == x.shape[0] and angles.shape[-1] % 2 == 0
    result: torch.Tensor = _Rotary.apply(x, rotation_table(angles, scale), layout)
    return result
