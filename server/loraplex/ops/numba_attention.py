"""Paged attention and the writing of its cache on a CPU.

A task is one key/value head with a few neighbouring tokens of one sequence; G query heads a key/value head make up to
ROWS query rows (one token: G), which share the loads of keys and values. A task walks the keys in tiles of KEYS
positions, aligned to position 0, with an online softmax in float32 (Milakov and Gimelshein 2018). Positions a row may
not see get the logit -inf and so add exactly nothing: a row's result depends on its own position and window alone, not
on the tokens it shares a task with, nor on how its sequence was cut into chunks.

Arguments are data pointers and int64s; strides are in bytes, of a token's row and of a head within it, for the caches
of a block, of a position and of a head. Scratch of one worker, in float32 words:

    query [rows, D padded to LANES] | weight [rows, KEYS] | sum [rows, Dv padded] | statistics [rows, 3] | addresses
"""

from typing import Any

import numpy as np

from loraplex.ops.numba_attention_tiles import KEYS, ZERO, dot_rows, padded, store_tile, sum_rows
from loraplex.ops.numba_lanes import (
    add,
    divide,
    exp,
    keep_between,
    max_lanes,
    maximum,
    multiply,
    splat,
    subtract,
    sum_lanes,
    tanh,
)
from loraplex.ops.numba_threads import SERIAL_WORK, run_workers
from loraplex.ops.numba_types import (
    FLOAT32,
    LANES,
    copy_bytes,
    inline,
    jit,
    load,
    load_lanes,
    poke,
    prefetch,
    read_float32,
    read_int32,
    read_int64,
    size_of,
    store_first,
)

ROWS = 16  # query rows of one task, unless a single token already has more

LINE = 64  # bytes of a cache line
ONE = np.float32(1)
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
    a, b = exp(subtract(a, shift)), exp(subtract(b, shift))
    c, d = exp(subtract(c, shift)), exp(subtract(d, shift))
    store_tile(weight, a, b, c, d)
    correction = _exp(before - largest if largest > NOTHING else ZERO)
    poke(statistics, largest)
    poke(statistics + 4, total * correction + sum_lanes(add(add(a, b), add(c, d))))
    poke(statistics + 8, correction)


@inline
def _exp(x: Any) -> Any:
    """exp of one float32 <= 0."""
    return max_lanes(exp(splat(x)))


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
    k_width, v_width = padded(k_size), padded(v_size)
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
            key = k_cache + block * k_strides[0] + place * k_strides[1]
            value = v_cache + block * v_strides[0] + place * v_strides[1]
            poke(keys + 8 * j, key)
            poke(values + 8 * j, value)
            for at in range(0, k_size * size_of(element), LINE):
                prefetch(key + at)
            for at in range(0, v_size * size_of(element), LINE):
                prefetch(value + at)
        count = min(KEYS, last + 1 - tile)
        if k_size % LANES == 0:
            dot_rows(element, scratch, k_size, True, rows, keys, count, weight)
        else:
            dot_rows(element, scratch, k_size, False, rows, keys, count, weight)
        for row in range(rows):
            position = first + row // group
            low, high = position - window + 1 - tile, position - tile
            _soften(weight + 4 * row * KEYS, statistics + 12 * row, scale, softcap, max(low, -1), min(high, KEYS))
        sum_rows(element, v_size, rows, values, count, weight, statistics, total)
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
    worker: int,
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
                        scratch + worker * scratch_stride,
                    )
                task += 1


@jit
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
    num_sequences, cu_seqlens_q, seq_lens, _, _ = sequences
    pairs = 0
    for i in range(num_sequences):
        new = read_int32(cu_seqlens_q, i + 1) - read_int32(cu_seqlens_q, i)
        pairs += new * min(read_int32(seq_lens, i), window)
    if pairs * heads * sizes[3] * (sizes[1] + sizes[2]) < SERIAL_WORK:
        workers = 1
    run_workers(
        attention_share,
        workers,
        (
            element, q, q_strides, out, out_strides, k_cache, k_strides, v_cache, v_strides, sizes, heads, sequences,
            np.float32(scale), window, np.float32(softcap), sinks, scratch, scratch_stride, workers,
        ),
    )  # fmt: skip


def scratch_words(group: int, k_size: int, v_size: int) -> int:
    """Float32 words of scratch one worker needs; `group`: query heads per key/value head."""
    rows = max(ROWS, group)
    padded = (k_size + LANES - 1) // LANES * LANES + (v_size + LANES - 1) // LANES * LANES
    return rows * (padded + KEYS + 3) + 4 * KEYS + 2
