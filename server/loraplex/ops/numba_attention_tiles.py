"""The inner loops of attention over one tile of keys, with their sums in registers.

A dot product sums the features d ≡ lane (mod 16) in order and folds the lanes as a fixed tree; a weighted sum takes
the keys in order. Tiles of two rows compute for each row exactly what the tile of one row computes. `keys` and
`values` are the addresses of int64 addresses, one a position; weights are rows of KEYS float32.
"""

from typing import Any

import numpy as np

from loraplex.ops.numba_lanes import multiply, multiply_add, poke_four_sums, splat
from loraplex.ops.numba_types import (
    FLOAT32,
    LANES,
    inline,
    load,
    load_lanes,
    read_float32,
    read_int64,
    size_of,
    store_first,
)

KEYS = 4 * LANES  # key positions of one tile
ZERO = np.float32(0)


@inline
def padded(size: int) -> int:
    return (size + LANES - 1) // LANES * LANES


@inline
def dot_rows(element: Any, query: int, size: int, whole: bool, rows: int, keys: int, count: int, weight: int) -> None:
    """weight[0:rows, 0:count rounded up to 4] = query · kᵀ; `keys` are the addresses of the KEYS keys."""
    width = 4 * padded(size)
    for j in range(0, count, 4):
        k0, k1 = read_int64(keys, j), read_int64(keys, j + 1)
        k2, k3 = read_int64(keys, j + 2), read_int64(keys, j + 3)
        for row in range(0, rows - rows % 2, 2):
            _dot_2x4(
                element,
                query + row * width,
                width,
                size,
                whole,
                k0,
                k1,
                k2,
                k3,
                weight + 4 * (row * KEYS + j),
            )
        if rows % 2:
            row = rows - 1
            _dot_1x4(element, query + row * width, size, whole, k0, k1, k2, k3, weight + 4 * (row * KEYS + j))


@inline
def _dot_2x4(
    element: Any, q: int, width: int, size: int, whole: bool, k0: int, k1: int, k2: int, k3: int, out: int
) -> None:
    zero = splat(ZERO)
    a0, a1, a2, a3 = zero, zero, zero, zero
    b0, b1, b2, b3 = zero, zero, zero, zero
    for d in range(0, size, LANES):
        at, count = d * size_of(element), size - d
        a, b = load(FLOAT32, q + 4 * d), load(FLOAT32, q + width + 4 * d)
        k = load_lanes(element, k0 + at, count, whole)
        a0, b0 = multiply_add(a, k, a0), multiply_add(b, k, b0)
        k = load_lanes(element, k1 + at, count, whole)
        a1, b1 = multiply_add(a, k, a1), multiply_add(b, k, b1)
        k = load_lanes(element, k2 + at, count, whole)
        a2, b2 = multiply_add(a, k, a2), multiply_add(b, k, b2)
        k = load_lanes(element, k3 + at, count, whole)
        a3, b3 = multiply_add(a, k, a3), multiply_add(b, k, b3)
    poke_four_sums(out, a0, a1, a2, a3)
    poke_four_sums(out + 4 * KEYS, b0, b1, b2, b3)


@inline
def _dot_1x4(element: Any, q: int, size: int, whole: bool, k0: int, k1: int, k2: int, k3: int, out: int) -> None:
    zero = splat(ZERO)
    a0, a1, a2, a3 = zero, zero, zero, zero
    for d in range(0, size, LANES):
        at, count = d * size_of(element), size - d
        a = load(FLOAT32, q + 4 * d)
        a0 = multiply_add(a, load_lanes(element, k0 + at, count, whole), a0)
        a1 = multiply_add(a, load_lanes(element, k1 + at, count, whole), a1)
        a2 = multiply_add(a, load_lanes(element, k2 + at, count, whole), a2)
        a3 = multiply_add(a, load_lanes(element, k3 + at, count, whole), a3)
    poke_four_sums(out, a0, a1, a2, a3)


@inline
def sum_rows(
    element: Any,
    size: int,
    rows: int,
    values: int,
    count: int,
    weight: int,
    statistics: int,
    total: int,
) -> None:
    """total[row] = correction · total[row] + Σ_j weight[row, j] · v[j], for j < count in order."""
    width = padded(size)
    tiles, twos = size - size % (4 * LANES), rows - rows % 2
    for row in range(0, twos, 2):
        for d in range(0, tiles, 4 * LANES):
            _sum_2_rows(
                element,
                d,
                values,
                count,
                weight + 4 * row * KEYS,
                statistics + 12 * row,
                total + 4 * (row * width + d),
                4 * width,
            )
    for row in range(rows):
        correction = splat(read_float32(statistics, 3 * row + 2))
        w, out = weight + 4 * row * KEYS, total + 4 * row * width
        if row >= twos:
            for d in range(0, tiles, 4 * LANES):
                _sum_1_row(element, d, values, count, w, correction, out + 4 * d)
        for d in range(tiles, size, LANES):
            if size - d >= LANES:
                _sum_lane(element, d, LANES, True, values, count, w, correction, out + 4 * d)
            else:
                _sum_lane(element, d, size - d, False, values, count, w, correction, out + 4 * d)


@inline
def _sum_2_rows(
    element: Any, d: int, values: int, count: int, weight: int, statistics: int, out: int, width: int
) -> None:
    """sum_rows for the 4 · LANES features from d of two rows."""
    step = LANES * size_of(element)
    a, b = splat(read_float32(statistics, 2)), splat(read_float32(statistics, 5))
    other = out + width
    a0, b0 = multiply(a, load(FLOAT32, out)), multiply(b, load(FLOAT32, other))
    a1, b1 = multiply(a, load(FLOAT32, out + 64)), multiply(b, load(FLOAT32, other + 64))
    a2, b2 = multiply(a, load(FLOAT32, out + 128)), multiply(b, load(FLOAT32, other + 128))
    a3, b3 = multiply(a, load(FLOAT32, out + 192)), multiply(b, load(FLOAT32, other + 192))
    for j in range(count):
        at = read_int64(values, j) + d * size_of(element)
        a, b = splat(read_float32(weight, j)), splat(read_float32(weight, KEYS + j))
        v = load(element, at)
        a0, b0 = multiply_add(a, v, a0), multiply_add(b, v, b0)
        v = load(element, at + step)
        a1, b1 = multiply_add(a, v, a1), multiply_add(b, v, b1)
        v = load(element, at + 2 * step)
        a2, b2 = multiply_add(a, v, a2), multiply_add(b, v, b2)
        v = load(element, at + 3 * step)
        a3, b3 = multiply_add(a, v, a3), multiply_add(b, v, b3)
    store_tile(out, a0, a1, a2, a3)
    store_tile(other, b0, b1, b2, b3)


@inline
def _sum_1_row(element: Any, d: int, values: int, count: int, weight: int, correction: Any, out: int) -> None:
    """sum_rows for the 4 · LANES features from d of one row."""
    step = LANES * size_of(element)
    a0, a1 = multiply(correction, load(FLOAT32, out)), multiply(correction, load(FLOAT32, out + 64))
    a2, a3 = multiply(correction, load(FLOAT32, out + 128)), multiply(correction, load(FLOAT32, out + 192))
    for j in range(count):
        at, a = read_int64(values, j) + d * size_of(element), splat(read_float32(weight, j))
        a0, a1 = multiply_add(a, load(element, at), a0), multiply_add(a, load(element, at + step), a1)
        a2 = multiply_add(a, load(element, at + 2 * step), a2)
        a3 = multiply_add(a, load(element, at + 3 * step), a3)
    store_tile(out, a0, a1, a2, a3)


@inline
def store_tile(out: int, a: Any, b: Any, c: Any, d: Any) -> None:
    """Four vectors of float32, side by side."""
    store_first(FLOAT32, out, a, LANES)
    store_first(FLOAT32, out + 64, b, LANES)
    store_first(FLOAT32, out + 128, c, LANES)
    store_first(FLOAT32, out + 192, d, LANES)


@inline
def _sum_lane(
    element: Any,
    d: int,
    lanes: int,
    whole: bool,
    values: int,
    count: int,
    weight: int,
    correction: Any,
    out: int,
) -> None:
    """sum_rows for the `lanes` features from d of one row."""
    total = multiply(correction, load(FLOAT32, out))
    for j in range(count):
        v = load_lanes(element, read_int64(values, j) + d * size_of(element), lanes, whole)
        total = multiply_add(splat(read_float32(weight, j)), v, total)
    store_first(FLOAT32, out, total, LANES)
