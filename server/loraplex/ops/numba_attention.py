"""Paged attention and the writing of its cache on a CPU.

A task is one key/value head with a few neighbouring tokens of one sequence: TOKENS·G query rows that share the loads
of keys and values (G = query heads per key/value head). It walks the keys in tiles of KEYS positions, aligned to
position 0, with an online softmax in float32 (Milakov and Gimelshein 2018). Positions a row may not see get the logit
-inf and so add exactly nothing: a row's result depends on its own position and window alone, not on the tokens it
shares a task with, nor on how its sequence was cut into chunks.

Arguments are data pointers and int64s; strides are in bytes, of a token's row and of a head within it, for the caches
of a block, of a position and of a head. Scratch of one worker, in float32 words:

    query [rows, D padded to LANES] | weight [rows, KEYS] | sum [rows, Dv padded] | statistics [rows, 3] | addresses
"""

from typing import Any

import numpy as np
from numba import prange

from loraplex.ops.numba_types import (
    FLOAT32,
    LANES,
    add,
    copy_bytes,
    divide,
    exp,
    inline,
    jit,
    keep_between,
    load,
    load_lanes,
    max_lanes,
    maximum,
    multiply,
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
    subtract,
    sum_lanes,
    tanh,
)

KEYS = 4 * LANES  # key positions of one tile
ROWS = 16  # query rows of one task, unless a single token already has more

ZERO, ONE = np.float32(0), np.float32(1)
NOTHING = np.float32(-np.inf)


@jit
def store_kv(
    k: int,
    k_strides: Any,
    v: int,
    v_strides: Any,
    k_cache: int,
    k_cache_strides: Any,
    v_cache: int,
    v_cache_strides: Any,
    slot_mapping: int,
    block_size: int,
    tokens: int,
    heads: int,
    k_bytes: int,
    v_bytes: int,
) -> None:
    """cache[slot // block_size, slot % block_size, h] = k[t, h], and v; a head is `k_bytes`, `v_bytes` long."""
    for t in range(tokens):
        slot = read_int64(slot_mapping, t)
        block, position = slot // block_size, slot % block_size
        k_row = k_cache + block * k_cache_strides[0] + position * k_cache_strides[1]
        v_row = v_cache + block * v_cache_strides[0] + position * v_cache_strides[1]
        for h in range(heads):
            copy_bytes(k_row + h * k_cache_strides[2], k + t * k_strides[0] + h * k_strides[1], k_bytes)
            copy_bytes(v_row + h * v_cache_strides[2], v + t * v_strides[0] + h * v_strides[1], v_bytes)


@inline
def _padded(size: int) -> int:
    return (size + LANES - 1) // LANES * LANES


@inline
def _dot_rows(
    element: Any, query: int, size: int, whole: bool, rows: int, keys: int, count: int, weight: int
) -> None:
    """weight[0:rows, 0:count rounded up to 4] = query · kᵀ; `keys` are the addresses of the KEYS keys."""
    width = 4 * _padded(size)
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
def _dot_1x4(
    element: Any, q: int, size: int, whole: bool, k0: int, k1: int, k2: int, k3: int, out: int
) -> None:
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
def _logits(weight: int, scale: float, softcap: float, low: int, high: int) -> Any:
    """Sixteen logits, scaled and capped; -inf outside low..high."""
    x = multiply(load(FLOAT32, weight), splat(scale))
    if softcap > ZERO:
        x = multiply(tanh(divide(x, splat(softcap))), splat(softcap))
    return keep_between(x, low, high)


@inline
def _soften(weight: int, statistics: int, scale: float, softcap: float, low: int, high: int) -> None:
    """Turn one row of products into weights exp(logit - largest so far), of which low..high are visible.

    statistics = (largest, total, correction): the largest logit and the sum of weights so far, brought up to date,
    and exp(old largest - new largest), by which what was summed before must be multiplied.
    """
    a = _logits(weight, scale, softcap, low, high)
    b = _logits(weight + 4 * LANES, scale, softcap, low - LANES, high - LANES)
    c = _logits(weight + 8 * LANES, scale, softcap, low - 2 * LANES, high - 2 * LANES)
    d = _logits(weight + 12 * LANES, scale, softcap, low - 3 * LANES, high - 3 * LANES)
    before, total = read_float32(statistics, 0), read_float32(statistics, 1)
    largest = max(before, max_lanes(maximum(maximum(a, b), maximum(c, d))))
    shift = splat(largest if largest > NOTHING else ZERO)  # nothing visible yet: every weight is exp(-inf)
    a, b, c, d = (
        exp(subtract(a, shift)),
        exp(subtract(b, shift)),
        exp(subtract(c, shift)),
        exp(subtract(d, shift)),
    )
    store_first(FLOAT32, weight, a, LANES)
    store_first(FLOAT32, weight + 4 * LANES, b, LANES)
    store_first(FLOAT32, weight + 8 * LANES, c, LANES)
    store_first(FLOAT32, weight + 12 * LANES, d, LANES)
    correction = _exp(before - largest if largest > NOTHING else ZERO)
    poke(statistics, largest)
    poke(statistics + 4, total * correction + sum_lanes(add(add(a, b), add(c, d))))
    poke(statistics + 8, correction)


@inline
def _exp(x: float) -> float:
    return max_lanes(exp(splat(x)))


@inline
def _sum_rows(
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
    width = _padded(size)
    tiles = size - size % (4 * LANES)
    for row in range(rows):
        correction = splat(read_float32(statistics, 3 * row + 2))
        w, out = weight + 4 * row * KEYS, total + 4 * row * width
        for d in range(0, tiles, 4 * LANES):
            _sum_tile(element, d, values, count, w, correction, out + 4 * d)
        for d in range(tiles, size, LANES):
            if size - d >= LANES:
                _sum_lane(element, d, LANES, True, values, count, w, correction, out + 4 * d)
            else:
                _sum_lane(element, d, size - d, False, values, count, w, correction, out + 4 * d)


@inline
def _sum_tile(element: Any, d: int, values: int, count: int, weight: int, correction: Any, out: int) -> None:
    """_sum_rows for the 4 · LANES features from d of one row."""
    step = LANES * size_of(element)
    s0 = multiply(correction, load(FLOAT32, out))
    s1 = multiply(correction, load(FLOAT32, out + 4 * LANES))
    s2 = multiply(correction, load(FLOAT32, out + 8 * LANES))
    s3 = multiply(correction, load(FLOAT32, out + 12 * LANES))
    for j in range(count):
        v, w = read_int64(values, j) + d * size_of(element), splat(read_float32(weight, j))
        s0 = multiply_add(w, load(element, v), s0)
        s1 = multiply_add(w, load(element, v + step), s1)
        s2 = multiply_add(w, load(element, v + 2 * step), s2)
        s3 = multiply_add(w, load(element, v + 3 * step), s3)
    store_first(FLOAT32, out, s0, LANES)
    store_first(FLOAT32, out + 4 * LANES, s1, LANES)
    store_first(FLOAT32, out + 8 * LANES, s2, LANES)
    store_first(FLOAT32, out + 12 * LANES, s3, LANES)


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
    """_sum_rows for the `lanes` features from d of one row."""
    total = multiply(correction, load(FLOAT32, out))
    for j in range(count):
        v = load_lanes(element, read_int64(values, j) + d * size_of(element), lanes, whole)
        total = multiply_add(splat(read_float32(weight, j)), v, total)
    store_first(FLOAT32, out, total, LANES)


@inline
def _attend(
    element: Any,
    q: int,
    q_strides: Any,
    out: int,
    out_strides: Any,
    k_cache: int,
    k_strides: Any,
    v_cache: int,
    v_strides: Any,
    sizes: Any,
    table: int,
    first: int,
    tokens: int,
    scale: float,
    window: int,
    softcap: float,
    sinks: int,
    scratch: int,
) -> None:
    """The task: `tokens` neighbouring tokens from position `first`, the G query heads at q; writes their out.

    sizes = (block_size, D, Dv, G); table: the sequence's block ids; the caches point at the key/value head and
    `sinks` at its G sinks (0: none).
    """
    block_size, k_size, v_size, group = sizes
    rows = tokens * group
    k_width, v_width = _padded(k_size), _padded(v_size)
    weight = scratch + 4 * rows * k_width
    total = weight + 4 * rows * KEYS
    statistics = total + 4 * rows * v_width
    keys = statistics + 12 * rows + 4 * (rows % 2)
    values = keys + 8 * KEYS
    for row in range(rows):
        source = q + row // group * q_strides[0] + row % group * q_strides[1]
        for d in range(0, k_size, LANES):
            v = load_lanes(element, source + d * size_of(element), min(LANES, k_size - d), False)
            store_first(FLOAT32, scratch + 4 * (row * k_width + d), v, LANES)
        for d in range(0, v_width, LANES):
            store_first(FLOAT32, total + 4 * (row * v_width + d), splat(ZERO), LANES)
        poke(statistics + 12 * row, NOTHING)
        poke(statistics + 12 * row + 4, ZERO)
    last = first + tokens - 1
    visible = max(0, first - window + 1)
    for tile in range(visible // KEYS * KEYS, last + 1, KEYS):
        for j in range(KEYS):
            # A position that no row sees is masked; its address repeats a visible one, which surely holds numbers.
            position = min(max(tile + j, visible), last)
            block, place = read_int32(table, position // block_size), position % block_size
            poke(keys + 8 * j, k_cache + block * k_strides[0] + place * k_strides[1])
            poke(values + 8 * j, v_cache + block * v_strides[0] + place * v_strides[1])
        count = min(KEYS, last + 1 - tile)
        if k_size % LANES == 0:
            _dot_rows(element, scratch, k_size, True, rows, keys, count, weight)
        else:
            _dot_rows(element, scratch, k_size, False, rows, keys, count, weight)
        for row in range(rows):
            position = first + row // group
            low, high = position - window + 1 - tile, position - tile
            _soften(
                weight + 4 * row * KEYS, statistics + 12 * row, scale, softcap, max(low, -1), min(high, KEYS)
            )
        _sum_rows(element, v_size, rows, values, count, weight, statistics, total)
    for row in range(rows):
        largest, denominator = read_float32(statistics, 3 * row), read_float32(statistics, 3 * row + 1)
        correction = ONE
        if sinks != 0:
            sink = read_float32(sinks, row % group)
            top = max(largest, sink)
            correction = _exp(largest - top)
            denominator = denominator * correction + _exp(sink - top)
        target = out + row // group * out_strides[0] + row % group * out_strides[1]
        for d in range(0, v_size, LANES):
            v = load(FLOAT32, total + 4 * (row * v_width + d))
            v = divide(multiply(v, splat(correction)), splat(denominator))
            store_first(element, target + d * size_of(element), v, min(LANES, v_size - d))


@jit
def attention_share(
    element: Any,
    q: int,
    q_strides: Any,
    out: int,
    out_strides: Any,
    k_cache: int,
    k_strides: Any,
    v_cache: int,
    v_strides: Any,
    sizes: Any,
    heads: int,
    sequences: Any,
    scale: float,
    window: int,
    softcap: float,
    sinks: int,
    scratch: int,
    worker: int,
    workers: int,
) -> None:
    """Every `workers`-th task, from `worker` on, in the order sequence, tokens, head."""
    num_sequences, cu_seqlens_q, seq_lens, block_tables, table_stride = sequences
    group = sizes[3]
    most = max(1, ROWS // group)
    task = 0
    for i in range(num_sequences):
        begin, end = read_int32(cu_seqlens_q, i), read_int32(cu_seqlens_q, i + 1)
        before = read_int32(seq_lens, i) - end  # position of token t is before + t
        for t in range(begin, end, most):
            for head in range(heads):
                if task % workers == worker:
                    _attend(
                        element,
                        q + t * q_strides[0] + head * group * q_strides[1],
                        q_strides,
                        out + t * out_strides[0] + head * group * out_strides[1],
                        out_strides,
                        k_cache + head * k_strides[2],
                        k_strides,
                        v_cache + head * v_strides[2],
                        v_strides,
                        sizes,
                        block_tables + i * table_stride,
                        before + t,
                        min(most, end - t),
                        scale,
                        window,
                        softcap,
                        sinks + 4 * head * group if sinks != 0 else 0,
                        scratch,
                    )
                task += 1


@parallel_jit
def paged_attention(
    element: Any,
    q: int,
    q_strides: Any,
    out: int,
    out_strides: Any,
    k_cache: int,
    k_strides: Any,
    v_cache: int,
    v_strides: Any,
    sizes: Any,
    heads: int,
    sequences: Any,
    scale: float,
    window: int,
    softcap: float,
    sinks: int,
    scratch: int,
    scratch_stride: int,
    workers: int,
) -> None:
    """All tasks, split among `workers`; sequences = (B, cu_seqlens_q, seq_lens, block_tables, its row's bytes)."""
    scale, softcap = np.float32(scale), np.float32(softcap)
    if workers == 1:
        attention_share(
            element, q, q_strides, out, out_strides, k_cache, k_strides, v_cache, v_strides, sizes, heads,
            sequences, scale, window, softcap, sinks, scratch, 0, 1,
        )  # fmt: skip
    else:
        for worker in prange(workers):
            attention_share(
                element, q, q_strides, out, out_strides, k_cache, k_strides, v_cache, v_strides, sizes, heads,
                sequences, scale, window, softcap, sinks, scratch + worker * scratch_stride, worker, workers,
            )  # fmt: skip


def scratch_words(tokens_group: int, k_size: int, v_size: int) -> int:
    """Float32 words of scratch one worker needs; `tokens_group`: query heads per key/value head."""
    rows = max(ROWS, tokens_group)
    padded = (k_size + LANES - 1) // LANES * LANES + (v_size + LANES - 1) // LANES * LANES
    return rows * (padded + KEYS + 3) + 4 * KEYS + 2
