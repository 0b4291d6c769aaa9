"""Triton kernels behind query_key.py.

A tile is heads x channels of one token. Channel c of a head gets z[c] cos + z[p] sin, where p is
the other channel of its pair, z the norm's result, and ``sin`` is negative for a pair's first
channel; a channel that is not rotated is its own partner, with cos 1 and sin 0.
"""
# mypy: allow-untyped-defs

import triton
import triton.language as tl


@triton.jit
def rotation(table, place, length, channel, ROTATED: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Return partner, cosine and signed sine of each channel from ``table`` [2, length, R]."""
    rotates = channel < ROTATED
    if INTERLEAVED:
        is_first = channel % 2 == 0
        other = tl.where(is_first, channel + 1, channel - 1)
    else:
        is_first = channel < ROTATED // 2
        other = tl.where(is_first, channel + ROTATED // 2, channel - ROTATED // 2)
    partner = tl.where(rotates, other, channel)
    entry = table + place * ROTATED + channel
    cos = tl.load(entry, mask=rotates, other=1.0)
    sin = tl.load(entry + length * ROTATED, mask=rotates, other=0.0)
    return partner, cos, tl.where(is_first, -sin, sin)


@triton.jit
def inverse_rms(x, epsilon, FULL: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """Return 1 / sqrt(mean square + epsilon) of every head, or of all."""
    square = tl.sum(x * x, axis=1)[:, None]
    if FULL:
        square = tl.sum(square, axis=0)[None, :] / HEADS
    return 1.0 / tl.sqrt(square / WIDTH + epsilon)


@triton.jit
def forward_kernel(
    source,
    target,
    weight,
    table,
    token_stride,
    group_stride,
    samples,
    length,
    epsilon,
    ALL_HEADS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    ROTATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NORMED: tl.constexpr,
    FULL: tl.constexpr,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Norm and rotate one tile; ``target`` is contiguous [tokens, heads, WIDTH]."""
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    channel = tl.arange(0, CHANNELS)[None, :]
    inside = (head < ALL_HEADS) & (channel < WIDTH)
    partner, cos, sin = rotation(table, token // samples, length, channel, ROTATED, INTERLEAVED)
    source += token * token_stride + head // PER_GROUP * group_stride + head % PER_GROUP * WIDTH
    x = tl.load(source + channel, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(source + partner, mask=inside, other=0.0).to(tl.float32)
    if NORMED:
        inverse = inverse_rms(x, epsilon, FULL, ALL_HEADS, WIDTH)
        weight += head * WIDTH if FULL else head * 0
        x *= inverse * tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
        other *= inverse * tl.load(weight + partner, mask=inside, other=0.0).to(tl.float32)
    target += (token * ALL_HEADS + head) * WIDTH + channel
    tl.store(target, (x * cos + other * sin).to(target.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    grad,
    result,
    source,
    weight,
    weight_grad,
    table,
    grad_s,
    grad_b,
    grad_h,
    token_stride,
    group_stride,
    tokens,
    samples,
    length,
    epsilon,
    ALL_HEADS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    ROTATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NORMED: tl.constexpr,
    FULL: tl.constexpr,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Write the gradients of ``STEPS`` tokens, and their part of the weight's gradient.

    ``result`` and ``source`` are laid out alike; ``weight_grad`` is fp32 [programs, heads, WIDTH].
    """
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    channel = tl.arange(0, CHANNELS)[None, :]
    offset = head // PER_GROUP * group_stride + head % PER_GROUP * WIDTH + channel
    total = tl.zeros((HEADS, CHANNELS), tl.float32)
    for step in range(0, STEPS):
        token = tl.program_id(0).to(tl.int64) * STEPS + step
        place = token // samples
        inside = (head < tl.where(token < tokens, ALL_HEADS, 0)) & (channel < WIDTH)
        place = tl.where(token < tokens, place, 0)
        partner, cos, sin = rotation(table, place, length, channel, ROTATED, INTERLEAVED)
        row = grad + place * grad_s + token % samples * grad_b + head * grad_h
        of_own = tl.load(row + channel, mask=inside, other=0.0).to(tl.float32)
        of_other = tl.load(row + partner, mask=inside, other=0.0).to(tl.float32)
        slope = of_own * cos - of_other * sin  # the partner's sine has the other sign
        if NORMED:
            x = tl.load(source + token * token_stride + offset, mask=inside, other=0.0)
            inverse = inverse_rms(x.to(tl.float32), epsilon, FULL, ALL_HEADS, WIDTH)
            normed = x.to(tl.float32) * inverse
            total += slope * normed
            place_in_weight = head * WIDTH + channel if FULL else head * 0 + channel
            slope *= tl.load(weight + place_in_weight, mask=inside, other=0.0).to(tl.float32)
            projection = tl.sum(slope * normed, axis=1)[:, None] / WIDTH
            if FULL:
                projection = tl.sum(projection, axis=0)[None, :] / ALL_HEADS
            slope = inverse * (slope - normed * projection)
        target = result + token * token_stride + offset
        tl.store(target, slope.to(result.dtype.element_ty), mask=inside)
    if NORMED:
        inside = (head < ALL_HEADS) & (channel < WIDTH)
        entry = (tl.program_id(0) * ALL_HEADS + head) * WIDTH + channel
        tl.store(weight_grad + entry, total, mask=inside)
