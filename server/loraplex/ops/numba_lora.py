"""LoRA on a CPU: shrink s = x · Aᵀ and expand y += w · s · Bᵀ over the segments of a batch.

Adapters are read where they lie: `address[place]` is a slab's data pointer, each segment works with its own rank, no
weight is copied or gathered. Neighbouring rows of a segment share its loads, four at a time. In shrink, sixteen lanes
sum the features k ≡ lane (mod 16) in order and then fold as a fixed tree; in expand, a column sums the ranks in order.
A tile of four rows computes for each row exactly what the tile of one row computes: a row's result is the same
wherever it stands.

Arguments: `segments` = (S, start, end, place, scale, offset) and `module` = (in_features, out_features, address,
rank, offset_a, offset_b, scaling) are tuples of int64: counts, and the data pointers of the tensors of `LoRASegments`
and `ModulePool`. x, y, s are data pointers, their strides in bytes.
"""

from typing import Any

import numpy as np
from numba import prange

from loraplex.ops.numba_types import (
    LANES,
    add,
    inline,
    jit,
    load,
    load_first,
    load_lanes,
    multiply_add,
    parallel_jit,
    poke,
    poke_four_sums,
    read_float32,
    read_int32,
    read_int64,
    size_of,
    splat,
    store_first,
    sum_lanes,
)

ZERO = np.float32(0)
TILE = 4 * LANES  # columns of y whose sums one tile of expand keeps in registers


@inline
def _dot_4x4(
    element: Any, x: int, x_stride: int, a: int, features: int, whole: bool, s: int, s_stride: int
) -> None:
    """s[0:4, 0:4] = x[0:4] · A[0:4]ᵀ."""
    zero = splat(ZERO)
    s00, s01, s02, s03 = zero, zero, zero, zero
    s10, s11, s12, s13 = zero, zero, zero, zero
    s20, s21, s22, s23 = zero, zero, zero, zero
    s30, s31, s32, s33 = zero, zero, zero, zero
    row = features * size_of(element)
    for k in range(0, features, LANES):
        count, at = features - k, k * size_of(element)
        a0 = load_lanes(element, a + at, count, whole)
        a1 = load_lanes(element, a + row + at, count, whole)
        a2 = load_lanes(element, a + 2 * row + at, count, whole)
        a3 = load_lanes(element, a + 3 * row + at, count, whole)
        v = load_lanes(element, x + at, count, whole)
        s00, s01 = multiply_add(v, a0, s00), multiply_add(v, a1, s01)
        s02, s03 = multiply_add(v, a2, s02), multiply_add(v, a3, s03)
        v = load_lanes(element, x + x_stride + at, count, whole)
        s10, s11 = multiply_add(v, a0, s10), multiply_add(v, a1, s11)
        s12, s13 = multiply_add(v, a2, s12), multiply_add(v, a3, s13)
        v = load_lanes(element, x + 2 * x_stride + at, count, whole)
        s20, s21 = multiply_add(v, a0, s20), multiply_add(v, a1, s21)
        s22, s23 = multiply_add(v, a2, s22), multiply_add(v, a3, s23)
        v = load_lanes(element, x + 3 * x_stride + at, count, whole)
        s30, s31 = multiply_add(v, a0, s30), multiply_add(v, a1, s31)
        s32, s33 = multiply_add(v, a2, s32), multiply_add(v, a3, s33)
    poke_four_sums(s, s00, s01, s02, s03)
    poke_four_sums(s + s_stride, s10, s11, s12, s13)
    poke_four_sums(s + 2 * s_stride, s20, s21, s22, s23)
    poke_four_sums(s + 3 * s_stride, s30, s31, s32, s33)


@inline
def _dot_1x4(element: Any, x: int, a: int, features: int, whole: bool, s: int) -> None:
    """s[0:4] = x · A[0:4]ᵀ for one row."""
    zero = splat(ZERO)
    s0, s1, s2, s3 = zero, zero, zero, zero
    row = features * size_of(element)
    for k in range(0, features, LANES):
        count, at = features - k, k * size_of(element)
        v = load_lanes(element, x + at, count, whole)
        s0 = multiply_add(v, load_lanes(element, a + at, count, whole), s0)
        s1 = multiply_add(v, load_lanes(element, a + row + at, count, whole), s1)
        s2 = multiply_add(v, load_lanes(element, a + 2 * row + at, count, whole), s2)
        s3 = multiply_add(v, load_lanes(element, a + 3 * row + at, count, whole), s3)
    poke_four_sums(s, s0, s1, s2, s3)


@inline
def _dot(element: Any, x: int, a: int, features: int, s: int) -> None:
    """s[0] = x · A[0] for one row: the ranks left over by the fours."""
    total = splat(ZERO)
    for k in range(0, features, LANES):
        count, at = features - k, k * size_of(element)
        total = multiply_add(load_first(element, x + at, count), load_first(element, a + at, count), total)
    poke(s, sum_lanes(total))


@inline
def _shrink_rows(
    element: Any,
    x: int,
    x_stride: int,
    a: int,
    features: int,
    whole: bool,
    rank: int,
    s: int,
    s_stride: int,
    rows: int,
) -> None:
    """s[0:rows, 0:rank] = x[0:rows] · Aᵀ for neighbouring rows of one adapter."""
    row_fours, rank_fours = rows - rows % 4, rank - rank % 4
    for r in range(0, rank_fours, 4):
        block, out = a + r * features * size_of(element), s + 4 * r
        for t in range(0, row_fours, 4):
            _dot_4x4(
                element,
                x + t * x_stride,
                x_stride,
                block,
                features,
                whole,
                out + t * s_stride,
                s_stride,
            )
        for t in range(row_fours, rows):
            _dot_1x4(element, x + t * x_stride, block, features, whole, out + t * s_stride)
    for r in range(rank_fours, rank):
        block, out = a + r * features * size_of(element), s + 4 * r
        for t in range(rows):
            _dot(element, x + t * x_stride, block, features, out + t * s_stride)


@jit
def shrink_share(
    element: Any,
    x: int,
    x_stride: int,
    s: int,
    s_stride: int,
    segments: Any,
    module: Any,
    first: int,
    last: int,
) -> None:
    """The rows first..last (last excluded) of s, of whatever segments they are."""
    num_segments, start, end, place, _, offset = segments
    features, _, address, rank, offset_a, _, _ = module
    for i in range(num_segments):
        begin = read_int32(offset, i)
        low = max(first, begin)
        rows = min(last, begin + read_int32(end, i) - read_int32(start, i)) - low
        where = read_int32(place, i)
        r = read_int32(rank, where)
        if rows <= 0 or r == 0:
            continue
        a = read_int64(address, where) + read_int64(offset_a, where) * size_of(element)
        row, out = x + (read_int32(start, i) + low - begin) * x_stride, s + low * s_stride
        if features % LANES == 0:
            _shrink_rows(element, row, x_stride, a, features, True, r, out, s_stride, rows)
        else:
            _shrink_rows(element, row, x_stride, a, features, False, r, out, s_stride, rows)


@inline
def _add_4_rows(
    element: Any, y: int, y_stride: int, s: int, s_stride: int, w: float, bt: int, row: int, rank: int
) -> None:
    """y[0:4, 0:TILE] += w · s[0:4, 0:rank] · Bᵀ[:, 0:TILE]; `row` is the stride of Bᵀ."""
    zero = splat(ZERO)
    y00, y01, y02, y03 = zero, zero, zero, zero
    y10, y11, y12, y13 = zero, zero, zero, zero
    y20, y21, y22, y23 = zero, zero, zero, zero
    y30, y31, y32, y33 = zero, zero, zero, zero
    step = LANES * size_of(element)
    for r in range(rank):
        b = bt + r * row
        b0, b1 = load(element, b), load(element, b + step)
        b2, b3 = load(element, b + 2 * step), load(element, b + 3 * step)
        c = splat(w * read_float32(s, r))
        y00, y01 = multiply_add(c, b0, y00), multiply_add(c, b1, y01)
        y02, y03 = multiply_add(c, b2, y02), multiply_add(c, b3, y03)
        c = splat(w * read_float32(s + s_stride, r))
        y10, y11 = multiply_add(c, b0, y10), multiply_add(c, b1, y11)
        y12, y13 = multiply_add(c, b2, y12), multiply_add(c, b3, y13)
        c = splat(w * read_float32(s + 2 * s_stride, r))
        y20, y21 = multiply_add(c, b0, y20), multiply_add(c, b1, y21)
        y22, y23 = multiply_add(c, b2, y22), multiply_add(c, b3, y23)
        c = splat(w * read_float32(s + 3 * s_stride, r))
        y30, y31 = multiply_add(c, b0, y30), multiply_add(c, b1, y31)
        y32, y33 = multiply_add(c, b2, y32), multiply_add(c, b3, y33)
    _add_tile(element, step, y, y00, y01, y02, y03)
    _add_tile(element, step, y + y_stride, y10, y11, y12, y13)
    _add_tile(element, step, y + 2 * y_stride, y20, y21, y22, y23)
    _add_tile(element, step, y + 3 * y_stride, y30, y31, y32, y33)


@inline
def _add_1_row(element: Any, y: int, s: int, w: float, bt: int, row: int, rank: int) -> None:
    """y[0:TILE] += w · s[0:rank] · Bᵀ[:, 0:TILE] for one row."""
    zero = splat(ZERO)
    y0, y1, y2, y3 = zero, zero, zero, zero
    step = LANES * size_of(element)
    for r in range(rank):
        b, c = bt + r * row, splat(w * read_float32(s, r))
        y0, y1 = multiply_add(c, load(element, b), y0), multiply_add(c, load(element, b + step), y1)
        y2 = multiply_add(c, load(element, b + 2 * step), y2)
        y3 = multiply_add(c, load(element, b + 3 * step), y3)
    _add_tile(element, step, y, y0, y1, y2, y3)


@inline
def _add_tile(element: Any, step: int, y: int, y0: Any, y1: Any, y2: Any, y3: Any) -> None:
    """y[0:TILE] += (y0, y1, y2, y3): the one rounding of the segment."""
    store_first(element, y, add(load(element, y), y0), LANES)
    store_first(element, y + step, add(load(element, y + step), y1), LANES)
    store_first(element, y + 2 * step, add(load(element, y + 2 * step), y2), LANES)
    store_first(element, y + 3 * step, add(load(element, y + 3 * step), y3), LANES)


@inline
def _add_few(element: Any, y: int, s: int, w: float, bt: int, row: int, rank: int, count: int) -> None:
    """y[0:count] += w · s[0:rank] · Bᵀ[:, 0:count], count <= LANES: the columns left over by the tiles."""
    total = splat(ZERO)
    for r in range(rank):
        total = multiply_add(splat(w * read_float32(s, r)), load_first(element, bt + r * row, count), total)
    store_first(element, y, add(load_first(element, y, count), total), count)


@jit
def expand_share(
    element: Any,
    y: int,
    y_stride: int,
    s: int,
    s_stride: int,
    segments: Any,
    module: Any,
    first: int,
    last: int,
) -> None:
    """The columns first..last (last excluded) of y, every segment in order: no two workers write one column."""
    num_segments, start, end, place, scale, offset = segments
    _, features, address, rank, _, offset_b, scaling = module
    tiles = last - (last - first) % TILE
    for i in range(num_segments):
        where = read_int32(place, i)
        ranks = read_int32(rank, where)
        if ranks == 0:
            continue
        rows = read_int32(end, i) - read_int32(start, i)
        fours = rows - rows % 4
        w = read_float32(scale, i) * read_float32(scaling, where)
        bt = read_int64(address, where) + read_int64(offset_b, where) * size_of(element)
        y_i, s_i = y + read_int32(start, i) * y_stride, s + read_int32(offset, i) * s_stride
        row = features * size_of(element)
        for column in range(first, tiles, TILE):
            b, out = bt + column * size_of(element), y_i + column * size_of(element)
            for t in range(0, fours, 4):
                _add_4_rows(
                    element,
                    out + t * y_stride,
                    y_stride,
                    s_i + t * s_stride,
                    s_stride,
                    w,
                    b,
                    row,
                    ranks,
                )
            for t in range(fours, rows):
                _add_1_row(element, out + t * y_stride, s_i + t * s_stride, w, b, row, ranks)
        for column in range(tiles, last, LANES):
            b, out = bt + column * size_of(element), y_i + column * size_of(element)
            for t in range(rows):
                _add_few(
                    element,
                    out + t * y_stride,
                    s_i + t * s_stride,
                    w,
                    b,
                    row,
                    ranks,
                    min(LANES, last - column),
                )


@parallel_jit
def shrink(
    element: Any,
    x: int,
    x_stride: int,
    s: int,
    s_stride: int,
    num_rows: int,
    segments: Any,
    module: Any,
    workers: int,
) -> None:
    """s[offset_i + t, :rank] = x[start_i + t] · Aᵀ; the rows of s are split among `workers`."""
    if workers == 1:
        shrink_share(element, x, x_stride, s, s_stride, segments, module, 0, num_rows)
    else:
        share = (num_rows + workers - 1) // workers
        for worker in prange(workers):
            low = worker * share
            shrink_share(element, x, x_stride, s, s_stride, segments, module, low, min(num_rows, low + share))


@parallel_jit
def expand(
    element: Any,
    y: int,
    y_stride: int,
    s: int,
    s_stride: int,
    segments: Any,
    module: Any,
    workers: int,
) -> None:
    """y[start_i + t] += scale_i · scaling · s[offset_i + t, :rank] · Bᵀ; the columns of y are split among
    `workers`."""
    columns = module[1]
    if workers == 1:
        expand_share(element, y, y_stride, s, s_stride, segments, module, 0, columns)
    else:
        share = (columns + workers * TILE - 1) // (workers * TILE) * TILE
        for worker in prange(workers):
            low = worker * share
            expand_share(element, y, y_stride, s, s_stride, segments, module, low, min(columns, low + share))


@parallel_jit
def add_lora(
    element: Any,
    y: int,
    y_stride: int,
    x: int,
    x_stride: int,
    s: int,
    s_stride: int,
    num_rows: int,
    segments: Any,
    module: Any,
    workers: int,
) -> None:
    """expand(y, shrink(x)) in one call."""
    shrink(element, x, x_stride, s, s_stride, num_rows, segments, module, workers)
    expand(element, y, y_stride, s, s_stride, segments, module, workers)
