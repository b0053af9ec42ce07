"""The inner loops of shrink and expand, with their sums in registers.

In a dot product sixteen lanes sum the features k ≡ lane (mod 16) in order and then fold as a fixed tree; a column of
expand sums the ranks in order. A tile of four rows computes for each row exactly what the tile of one row computes.
Arguments as in `numba_lora`; `whole` (a constant) says that the features are a multiple of LANES.
"""

from typing import Any

import numpy as np

from loraplex.ops.numba_lanes import add, multiply_add, poke_four_sums, splat, sum_lanes
from loraplex.ops.numba_types import (
    LANES,
    inline,
    load,
    load_first,
    load_lanes,
    poke,
    prefetch,
    read_float32,
    size_of,
    store_first,
)

ZERO = np.float32(0)
TILE = 4 * LANES  # columns of y whose sums one tile of expand keeps in registers


@inline
def dot_4x4(element: Any, x: int, x_stride: int, a: int, features: int, whole: bool, s: int, s_stride: int) -> None:
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
def dot_1x4(element: Any, x: int, a: int, features: int, whole: bool, s: int, ahead: int) -> None:
    """s[0:4] = x · A[0:4]ᵀ for one row. What lies `ahead` bytes further on is wanted next."""
    zero = splat(ZERO)
    s0, s1, s2, s3 = zero, zero, zero, zero
    row = features * size_of(element)
    for k in range(0, features, LANES):
        count, at = features - k, k * size_of(element)
        v = load_lanes(element, x + at, count, whole)
        prefetch(a + at + ahead)
        prefetch(a + row + at + ahead)
        prefetch(a + 2 * row + at + ahead)
        prefetch(a + 3 * row + at + ahead)
        s0 = multiply_add(v, load_lanes(element, a + at, count, whole), s0)
        s1 = multiply_add(v, load_lanes(element, a + row + at, count, whole), s1)
        s2 = multiply_add(v, load_lanes(element, a + 2 * row + at, count, whole), s2)
        s3 = multiply_add(v, load_lanes(element, a + 3 * row + at, count, whole), s3)
    poke_four_sums(s, s0, s1, s2, s3)


@inline
def dot_1x1(element: Any, x: int, a: int, features: int, s: int) -> None:
    """s[0] = x · A[0] for one row: the ranks left over by the fours."""
    total = splat(ZERO)
    for k in range(0, features, LANES):
        count, at = features - k, k * size_of(element)
        total = multiply_add(load_first(element, x + at, count), load_first(element, a + at, count), total)
    poke(s, sum_lanes(total))


@inline
def add_4_rows(
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
def add_1_row(element: Any, y: int, s: int, w: float, bt: int, row: int, rank: int, ahead: int) -> None:
    """y[0:TILE] += w · s[0:rank] · Bᵀ[:, 0:TILE] for one row. What lies `ahead` bytes further on is wanted next."""
    zero = splat(ZERO)
    y0, y1, y2, y3 = zero, zero, zero, zero
    step = LANES * size_of(element)
    for r in range(rank):
        b, c = bt + r * row, splat(w * read_float32(s, r))
        for line in range(0, 4 * step, 64):
            prefetch(b + line + ahead)
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
def add_few(element: Any, y: int, s: int, w: float, bt: int, row: int, rank: int, count: int) -> None:
    """y[0:count] += w · s[0:rank] · Bᵀ[:, 0:count], count <= LANES: the columns left over by the tiles."""
    total = splat(ZERO)
    for r in range(rank):
        total = multiply_add(splat(w * read_float32(s, r)), load_first(element, bt + r * row, count), total)
    store_first(element, y, add(load_first(element, y, count), total), count)
