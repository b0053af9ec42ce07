"""Triton kernels of `shrink` and `expand`, and the plan that both read.

A step's segments are cut into tiles of `rows` rows once (`plan`); shrink and expand of every module go over the same
tiles. Tile numbers need no counting: tile offset_i // rows + i is the first of segment i, and what lies between the
last tile of one segment and the first of the next is dead. So a grid covers num_rows // rows + S tiles whatever the
segments are, the number of live segments is read on the device, and a captured graph may be replayed with others.

    partial[k, r, :] = x[row of r, chunk k] @ A[:, chunk k]ᵀ     chunks of SPLIT_FEATURES features, added in order
    y[row] += scale · (Σ_k partial[k, r]) @ Bᵀ                   segment after segment, rounded once for each

Ranks are exact: lanes past an adapter's own rank are masked, so nothing is read or written for them.

What holds for a row's bits: a sum's order is given by the feature count and the rank alone, there are no atomics, and a
row that several segments cover belongs to one program, which applies them in order. So a row's bits do not depend on
its neighbours as long as the tile is the same: 16 rows high, or 64 where segments have more than 32 on average, and 16,
32 or 64 ranks wide by the widest adapter of the batch. (Another tile may be another instruction, with another order
inside.)

What changes from step to step is no reason to compile: such numbers are not specialised.
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# (a kernel's parameters are what its compiler makes of the arguments)

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex.ops import LoRASegments

SPLIT_FEATURES = 512
"""Features that one program of shrink sums. No result may depend on a batch, so this does not."""

TABLE_COLUMNS = 4
"""Of `ModulePool.table`: address of A, address of Bᵀ, rank, the bits of the scaling."""

_LOW_TILE, _HIGH_TILE = 16, 64
FEW_ROWS = 32
"""Rows of a segment, on average, up to which tiles are low."""

_SCAN = 256


@dataclass(frozen=True, slots=True)
class Plan:
    """The tiles of a step's segments.

    rows     rows of a tile
    tiles    int32 [N, 2]   segment of tile n and the first of its rows, counted within the segment; segment -1: dead
    overlap  int32 [S, 2]   of segment i: the first and the last segment that share a row with it, itself included
    """

    rows: int
    tiles: Tensor
    overlap: Tensor


def plan(lora: LoRASegments) -> Plan:
    """The plan of the segments, made at the first call of a step and kept with them."""
    if lora.plan is None:
        num_segments = lora.start.shape[0]
        rows = _LOW_TILE if lora.num_rows <= FEW_ROWS * num_segments else _HIGH_TILE
        num_tiles = lora.num_rows // rows + num_segments
        tiles = torch.empty(num_tiles, 2, dtype=torch.int32, device=lora.start.device)
        overlap = torch.empty(num_segments, 2, dtype=torch.int32, device=lora.start.device)
        has_count = lora.count is not None
        count = lora.count if has_count else lora.start
        plan_kernel[(num_segments,)](
            lora.start, lora.end, lora.offset, count, num_segments, tiles, overlap, num_tiles,
            HAS_COUNT=has_count, ROWS=rows, SCAN=_SCAN,
        )  # fmt: skip
        lora.plan = Plan(rows, tiles, overlap)
    return lora.plan


@triton.jit(do_not_specialize=["num_segments", "num_tiles"])
def plan_kernel(
    start, end, offset, count, num_segments, tiles, overlap, num_tiles,
    HAS_COUNT: tl.constexpr, ROWS: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """Program i writes the tiles from the first of segment i to the first of the next, and what overlaps it."""
    i = tl.program_id(0)
    live = num_segments
    if HAS_COUNT:
        live = tl.load(count)
    lane = tl.arange(0, SCAN)
    if i < live:
        mine, stop = tl.load(start + i), tl.load(end + i)
        first = tl.load(offset + i) // ROWS + i
        after = num_tiles
        if i + 1 < live:
            after = tl.load(offset + i + 1) // ROWS + i + 1
        for base in range(first, after, SCAN):
            tile = base + lane
            row = (tile - first) * ROWS
            tl.store(tiles + 2 * tile, tl.where(row < stop - mine, i, -1), mask=tile < after)
            tl.store(tiles + 2 * tile + 1, row, mask=tile < after)
        low, high = i, i
        for base in range(0, live, SCAN):
            other = base + lane
            other_start = tl.load(start + other, mask=other < live, other=0)
            other_end = tl.load(end + other, mask=other < live, other=0)
            shared = (tl.maximum(other_start, mine) < tl.minimum(other_end, stop)) & (other < live)
            low = tl.minimum(low, tl.min(tl.where(shared, other, i), axis=0))
            high = tl.maximum(high, tl.max(tl.where(shared, other, i), axis=0))
        tl.store(overlap + 2 * i, low)
        tl.store(overlap + 2 * i + 1, high)
    elif i == 0:
        for base in range(0, num_tiles, SCAN):
            tile = base + lane
            tl.store(tiles + 2 * tile, tl.full([SCAN], -1, tl.int32), mask=tile < num_tiles)


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def shrink_kernel(
    x, stride_x, partial, num_rows, max_rank, table, members, in_features,
    start, end, place, offset, tiles, num_splits,
    MEMBERS: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr, FEATURES: tl.constexpr,
    ALIGNED: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Program (tile, block of RANKS ranks, member · num_splits + split): partial float32 [member, split, num_rows,
    max_rank]."""
    tile = tl.program_id(0)
    segment = tl.load(tiles + 2 * tile)
    if segment < 0:
        return
    split = tl.program_id(2) % num_splits
    if MEMBERS > 1:
        member = tl.program_id(2) // num_splits
        table = tl.load(members + 3 * member).to(tl.pointer_type(tl.int64))
    entry = table + 4 * tl.load(place + segment).to(tl.int64)
    rank = tl.load(entry + 2).to(tl.int32)
    first_rank = tl.program_id(1) * RANKS
    if first_rank >= rank:
        return
    a = tl.load(entry).to(tl.pointer_type(x.dtype.element_ty))
    if ALIGNED:
        a = tl.multiple_of(a, 16)
    row = tl.load(tiles + 2 * tile + 1) + tl.arange(0, ROWS)
    begin = tl.load(start + segment)
    has_row = row < tl.load(end + segment) - begin
    ranks = first_rank + tl.arange(0, RANKS)
    x_rows = x + (begin + row).to(tl.int64)[:, None] * stride_x
    a_rows = a + ranks.to(tl.int64)[:, None] * in_features
    total = tl.zeros([ROWS, RANKS], tl.float32)
    for base in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, in_features), FEATURES):
        feature = base + tl.arange(0, FEATURES)
        has_feature = feature < in_features
        x_part = tl.load(x_rows + feature[None, :], mask=has_row[:, None] & has_feature[None, :], other=0.0)
        a_mask = (ranks < rank)[:, None] & has_feature[None, :]
        a_part = tl.load(a_rows + feature[None, :], mask=a_mask, other=0.0)
        if WIDEN:
            total = tl.dot(x_part.to(tl.float32), tl.trans(a_part.to(tl.float32)), total, input_precision="ieee")
        else:
            total = tl.dot(x_part, tl.trans(a_part), total)
    out_row = tl.program_id(2).to(tl.int64) * num_rows + tl.load(offset + segment) + row
    where = partial + out_row[:, None] * max_rank + ranks[None, :]
    tl.store(where, total, mask=has_row[:, None] & (ranks < rank)[None, :])


@triton.jit(do_not_specialize=["numel", "num_splits"])
def sum_kernel(partial, out, numel, num_splits, SIZE: tl.constexpr):
    """out[e] = Σ_k partial[k, e], in order."""
    index = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    mask = index < numel
    total = tl.zeros([SIZE], tl.float32)
    for k in range(num_splits):
        total += tl.load(partial + k * numel.to(tl.int64) + index, mask=mask, other=0.0)
    tl.store(out + index, total, mask=mask)


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def expand_kernel(
    y, stride_y, partial, stride_s, num_rows, num_splits, table, members, out_features,
    start, end, place, scale, offset, tiles, overlap,
    MEMBERS: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr, FEATURES: tl.constexpr,
    ALIGNED: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Program (tile, block of FEATURES outputs, member). A row is the business of the first segment that covers it:
    its program applies that one and all later ones, in order."""
    tile = tl.program_id(0)
    segment = tl.load(tiles + 2 * tile)
    if segment < 0:
        return
    dtype: tl.constexpr = y.dtype.element_ty
    if MEMBERS > 1:
        member = tl.program_id(2)
        table = tl.load(members + 3 * member).to(tl.pointer_type(tl.int64))
        column = tl.load(members + 3 * member + 1)
        out_features = tl.load(members + 3 * member + 2).to(tl.int32)
        if ALIGNED:
            column, out_features = tl.multiple_of(column, 8), tl.multiple_of(out_features, 8)
        y += column
        partial += member.to(tl.int64) * num_splits * num_rows * stride_s
    first = tl.program_id(1) * FEATURES
    if first >= out_features:
        return
    begin = tl.load(start + segment)
    row = begin + tl.load(tiles + 2 * tile + 1) + tl.arange(0, ROWS)
    is_mine = row < tl.load(end + segment)
    for other in range(tl.load(overlap + 2 * segment), segment):
        is_mine = is_mine & ((row < tl.load(start + other)) | (row >= tl.load(end + other)))
    if tl.max(is_mine.to(tl.int32), axis=0) == 0:
        return
    feature = first + tl.arange(0, FEATURES)
    has_feature = feature < out_features
    where = y + row.to(tl.int64)[:, None] * stride_y + feature[None, :]
    value = tl.load(where, mask=is_mine[:, None] & has_feature[None, :], other=0.0).to(tl.float32)
    for other in range(segment, tl.load(overlap + 2 * segment + 1) + 1):
        other_start = tl.load(start + other)
        covers = is_mine & (row >= other_start) & (row < tl.load(end + other))
        entry = table + 4 * tl.load(place + other).to(tl.int64)
        rank = tl.load(entry + 2).to(tl.int32)
        factor = tl.load(entry + 3).to(tl.int32).to(tl.float32, bitcast=True) * tl.load(scale + other)
        bt = tl.load(entry + 1).to(tl.pointer_type(dtype))
        if ALIGNED:
            bt = tl.multiple_of(bt, 16)
        s_row = tl.load(offset + other) + row - other_start
        delta = tl.zeros([ROWS, FEATURES], tl.float32)
        for base in range(0, rank, RANKS):
            ranks = base + tl.arange(0, RANKS)
            has_rank = ranks < rank
            s_where = partial + s_row.to(tl.int64)[:, None] * stride_s + ranks[None, :]
            s_mask = covers[:, None] & has_rank[None, :]
            s = tl.zeros([ROWS, RANKS], tl.float32)
            for k in range(num_splits):
                s += tl.load(s_where + k * num_rows.to(tl.int64) * stride_s, mask=s_mask, other=0.0)
            s = s * factor
            bt_where = bt + ranks.to(tl.int64)[:, None] * out_features + feature[None, :]
            b = tl.load(bt_where, mask=has_rank[:, None] & has_feature[None, :], other=0.0)
            if WIDEN:
                delta = tl.dot(s, b.to(tl.float32), delta, input_precision="ieee")
            elif dtype == tl.bfloat16:
                # s in two parts of 8 bits each: products and sums are float32's, the operands the hardware's own
                high = s.to(tl.bfloat16)
                low = (s - high.to(tl.float32)).to(tl.bfloat16)
                delta = tl.dot(high, b, delta)
                delta = tl.dot(low, b, delta)
            else:  # float16's range is too small for s
                delta = tl.dot(s, b.to(tl.float32), delta, input_precision="tf32x3")
        applied = (value + delta).to(dtype).to(tl.float32)
        value = tl.where((covers & (rank > 0))[:, None], applied, value)
    tl.store(where, value.to(dtype), mask=is_mine[:, None] & has_feature[None, :])
