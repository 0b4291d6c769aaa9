"""Triton kernel behind rotary.py."""
# mypy: allow-untyped-defs

import triton
import triton.language as tl


@triton.jit
def rotary_kernel(
    source,
    target,
    table,
    stride_s,
    stride_b,
    stride_h,
    samples,
    heads,
    length,
    sign,
    WIDTH: tl.constexpr,
    ROTATED: tl.constexpr,
    SOURCE_STEP: tl.constexpr,
    SOURCE_GAP: tl.constexpr,
    TARGET_STEP: tl.constexpr,
    TARGET_GAP: tl.constexpr,
    ANGLE_STEP: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
):
    """Rotate ``HEADS`` heads of one token, back if ``sign`` is -1.

    ``target`` is contiguous [s, b, heads, WIDTH], ``table`` [2, length, ROTATED].
    """
    token = tl.program_id(0).to(tl.int64)
    place, sample = token // samples, token % samples
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    pair = tl.arange(0, PAIRS)[None, :]
    of_pair = pair < ROTATED // 2
    inside = (head < heads) & of_pair
    entry = table + place * ROTATED + pair * ANGLE_STEP
    cos = tl.load(entry, mask=of_pair, other=0.0)
    sin = tl.load(entry + length * ROTATED, mask=of_pair, other=0.0) * sign
    source += place * stride_s + sample * stride_b + head * stride_h
    target += (token * heads + head) * WIDTH
    first = source + pair * SOURCE_STEP
    x = tl.load(first, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(first + SOURCE_GAP, mask=inside, other=0.0).to(tl.float32)
    first = target + pair * TARGET_STEP
    kind = target.dtype.element_ty
    tl.store(first, (x * cos - y * sin).to(kind), mask=inside)
    tl.store(first + TARGET_GAP, (y * cos + x * sin).to(kind), mask=inside)
    if WIDTH > ROTATED:
        channel = ROTATED + tl.arange(0, REST)[None, :]
        inside = (head < heads) & (channel < WIDTH)
        tl.store(target + channel, tl.load(source + channel, mask=inside), mask=inside)
