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

from loraplex.ops.numba_lora_tiles import TILE, add_1_row, add_4_rows, add_few, dot_1x1, dot_1x4, dot_4x4
from loraplex.ops.numba_threads import run_workers
from loraplex.ops.numba_types import (
    LANES,
    inline,
    jit,
    read_float32,
    read_int32,
    read_int64,
    size_of,
)


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
    ahead: int,
) -> None:
    """s[0:rows, 0:rank] = x[0:rows] · Aᵀ for neighbouring rows of one adapter; the next one's A lies `ahead` bytes
    further on."""
    row_fours, rank_fours = rows - rows % 4, rank - rank % 4
    for r in range(0, rank_fours, 4):
        block, out = a + r * features * size_of(element), s + 4 * r
        for t in range(0, row_fours, 4):
            dot_4x4(
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
            dot_1x4(element, x + t * x_stride, block, features, whole, out + t * s_stride, ahead)
    for r in range(rank_fours, rank):
        block, out = a + r * features * size_of(element), s + 4 * r
        for t in range(rows):
            dot_1x1(element, x + t * x_stride, block, features, out + t * s_stride)


@jit
def shrink_share(
    worker: int,
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
    """One of `workers` equal shares of the rows of s, of whatever segments they are."""
    share = (num_rows + workers - 1) // workers
    first, last = worker * share, min(num_rows, worker * share + share)
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
        following = read_int32(place, min(i + 1, num_segments - 1))
        ahead = read_int64(address, following) + read_int64(offset_a, following) * size_of(element) - a
        row, out = x + (read_int32(start, i) + low - begin) * x_stride, s + low * s_stride
        if features % LANES == 0:
            _shrink_rows(element, row, x_stride, a, features, True, r, out, s_stride, rows, ahead)
        else:
            _shrink_rows(element, row, x_stride, a, features, False, r, out, s_stride, rows, ahead)


@jit
def expand_share(
    worker: int,
    element: Any,
    y: int,
    y_stride: int,
    s: int,
    s_stride: int,
    segments: Any,
    module: Any,
    workers: int,
) -> None:
    """One of `workers` shares of the columns of y, every segment in order: no two workers write one column."""
    num_segments, start, end, place, scale, offset = segments
    _, features, address, rank, _, offset_b, scaling = module
    share = (features + workers * TILE - 1) // (workers * TILE) * TILE
    first, last = min(features, worker * share), min(features, worker * share + share)
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
        following = read_int32(place, min(i + 1, num_segments - 1))
        ahead = read_int64(address, following) + read_int64(offset_b, following) * size_of(element) - bt
        y_i, s_i = y + read_int32(start, i) * y_stride, s + read_int32(offset, i) * s_stride
        row = features * size_of(element)
        for column in range(first, tiles, TILE):
            b, out = bt + column * size_of(element), y_i + column * size_of(element)
            for t in range(0, fours, 4):
                add_4_rows(
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
                add_1_row(element, out + t * y_stride, s_i + t * s_stride, w, b, row, ranks, ahead)
        for column in range(tiles, last, LANES):
            b, out = bt + column * size_of(element), y_i + column * size_of(element)
            for t in range(rows):
                add_few(
                    element,
                    out + t * y_stride,
                    s_i + t * s_stride,
                    w,
                    b,
                    row,
                    ranks,
                    min(LANES, last - column),
                )


@jit
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
    run_workers(shrink_share, workers, (element, x, x_stride, s, s_stride, num_rows, segments, module, workers))


@jit
def expand(
    element: Any, y: int, y_stride: int, s: int, s_stride: int, segments: Any, module: Any, workers: int
) -> None:
    """y[start_i + t] += scale_i · scaling · s[offset_i + t, :rank] · Bᵀ; the columns of y are split among `workers`."""
    run_workers(expand_share, workers, (element, y, y_stride, s, s_stride, segments, module, workers))


@jit
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
