"""Triton kernels behind expert_rows.py; shapes and results as there."""
# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl

_MAX_BLOCK = 4096  # values of a row that a program holds at a time
_FLAT_BLOCK = 1024
_MAP_TILE = 4096  # entries of the map that a program holds
_ROWS_TO_CLEAR = 64  # that a program looks at


@triton.jit
def _plan_kernel(
    map_ptr,
    position_ptr,
    source_ptr,
    choice_ptr,
    slot_ptr,
    tokens,
    EXPERTS: tl.constexpr,
    TOPK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    expert = tl.arange(0, BLOCK_E)[None, :]
    inside = (token < tokens) & (expert < EXPERTS)
    chosen = tl.load(map_ptr + token * EXPERTS + expert, mask=inside, other=0) != 0
    place = tl.cumsum(chosen.to(tl.int32), axis=1) - 1
    row = tl.load(position_ptr + expert * tokens + token, mask=chosen, other=1).to(tl.int64) - 1
    tl.store(slot_ptr + token * TOPK + place, row, mask=chosen & (place < TOPK))
    tl.store(source_ptr + row, token, mask=chosen)
    tl.store(choice_ptr + row, token * EXPERTS + expert, mask=chosen)


@triton.jit
def _gather_kernel(
    x_ptr,
    source_ptr,
    slot_ptr,
    y_ptr,
    tokens,
    rows,
    WIDTH: tl.constexpr,
    TOPK: tl.constexpr,
    BLOCK: tl.constexpr,
    CLEAR: tl.constexpr,
):
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    if program < tokens:  # read a token once, write its rows
        token = program.to(tl.int64)
        for start in tl.static_range(0, WIDTH, BLOCK):
            inside = start + column < WIDTH
            x = tl.load(x_ptr + token * WIDTH + start + column, mask=inside)
            for k in tl.static_range(TOPK):
                row = tl.load(slot_ptr + token * TOPK + k)
                tl.store(y_ptr + row * WIDTH + start + column, x, mask=inside & (row >= 0))
    else:  # clear rows without a token
        first = (program - tokens).to(tl.int64) * CLEAR
        some = first + tl.arange(0, CLEAR)
        source = tl.load(source_ptr + some, mask=some < rows, other=0)
        if tl.min(source, axis=0) < 0:
            zero = tl.zeros([BLOCK], dtype=tl.float32).to(y_ptr.dtype.element_ty)
            for i in range(CLEAR):
                row = first + i
                unused = tl.load(source_ptr + row, mask=row < rows, other=0) < 0
                for start in tl.static_range(0, WIDTH, BLOCK):
                    inside = start + column < WIDTH
                    tl.store(y_ptr + row * WIDTH + start + column, zero, mask=inside & unused)


@triton.jit
def _combine_kernel(
    y_ptr, slot_ptr, x_ptr, WIDTH: tl.constexpr, TOPK: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    for start in tl.static_range(0, WIDTH, BLOCK):
        inside = start + column < WIDTH
        total = tl.zeros([BLOCK], dtype=tl.float32)
        for k in tl.static_range(TOPK):  # a fixed order: the same bits in every run
            row = tl.load(slot_ptr + token * TOPK + k)
            part_ptr = y_ptr + row * WIDTH + start + column
            total += tl.load(part_ptr, mask=inside & (row >= 0), other=0.0).to(tl.float32)
        x = total.to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + token * WIDTH + start + column, x, mask=inside)


@triton.jit
def _take_kernel(values_ptr, index_ptr, out_ptr, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(index_ptr + at, mask=at < count, other=-1)
    value = tl.load(values_ptr + index, mask=index >= 0, other=0.0)
    tl.store(out_ptr + at, value, mask=at < count)


@triton.jit
def _put_kernel(values_ptr, index_ptr, out_ptr, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(index_ptr + at, mask=at < count, other=-1)
    tl.store(out_ptr + index, tl.load(values_ptr + at, mask=at < count), mask=index >= 0)


def _block(width: int) -> int:
    return min(triton.next_power_of_2(width), _MAX_BLOCK)


def plan(
    map_TE: torch.Tensor, topk: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ``ends_E``, ``source_R``, ``choice_R`` and ``slot_TK``."""
    tokens, experts = map_TE.shape
    # -1 everywhere in one launch.
    filled = torch.full((3, tokens * topk), -1, dtype=torch.int64, device=map_TE.device)
    source_R, choice_R, slots = filled.unbind()
    slot_TK = slots.view(tokens, topk)
    if not tokens:
        return map_TE.sum(0, dtype=torch.int32), source_R, choice_R, slot_TK
    # A prefix sum over the map, expert by expert, numbers the rows from 1.
    position_ET = map_TE.t().reshape(-1).cumsum(0, dtype=torch.int32).view(experts, tokens)
    block_E = triton.next_power_of_2(experts)
    block_T = max(_MAP_TILE // block_E, 1)
    _plan_kernel[(triton.cdiv(tokens, block_T),)](
        map_TE.contiguous().view(torch.uint8),
        position_ET,
        source_R,
        choice_R,
        slot_TK,
        tokens,
        EXPERTS=experts,
        TOPK=topk,
        BLOCK_T=block_T,
        BLOCK_E=block_E,
    )
    return position_ET[:, -1].contiguous(), source_R, choice_R, slot_TK


def gather(x_TH: torch.Tensor, source_R: torch.Tensor, slot_TK: torch.Tensor) -> torch.Tensor:
    """Return each row's token."""
    (tokens, topk), rows, width = slot_TK.shape, len(source_R), x_TH.shape[1]
    y_RH = x_TH.new_empty(rows, width)
    if rows:
        _gather_kernel[(tokens + triton.cdiv(rows, _ROWS_TO_CLEAR),)](
            x_TH.contiguous(),
            source_R,
            slot_TK,
            y_RH,
            tokens,
            rows,
            WIDTH=width,
            TOPK=topk,
            BLOCK=_block(width),
            CLEAR=_ROWS_TO_CLEAR,
        )
    return y_RH


def combine(y_RH: torch.Tensor, slot_TK: torch.Tensor) -> torch.Tensor:
    """Return the sums of each token's rows."""
    (tokens, topk), width = slot_TK.shape, y_RH.shape[1]
    x_TH = y_RH.new_empty(tokens, width)
    if tokens:
        _combine_kernel[(tokens,)](
            y_RH.contiguous(), slot_TK, x_TH, WIDTH=width, TOPK=topk, BLOCK=_block(width)
        )
    return x_TH


def take(probs_TE: torch.Tensor, choice_R: torch.Tensor) -> torch.Tensor:
    """Return each row's weight."""
    rows = len(choice_R)
    out_R = probs_TE.new_empty(rows)
    if rows:
        grid = (triton.cdiv(rows, _FLAT_BLOCK),)
        _take_kernel[grid](probs_TE.contiguous(), choice_R, out_R, rows, BLOCK=_FLAT_BLOCK)
    return out_R


def put(grad_R: torch.Tensor, choice_R: torch.Tensor, map_shape: torch.Size) -> torch.Tensor:
    """Return the gradient of the weights."""
    rows = len(choice_R)
    out_TE = grad_R.new_zeros(map_shape)
    if rows:
        grid = (triton.cdiv(rows, _FLAT_BLOCK),)
        _put_kernel[grid](grad_R.contiguous(), choice_R, out_TE, rows, BLOCK=_FLAT_BLOCK)
    return out_TE
