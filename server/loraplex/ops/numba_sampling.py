"""Drawing tokens on a CPU: the noise of `noise`, sixteen tokens at a time, never written to memory."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false
# (llvmlite and numba's extension API carry no usable types)

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types

from loraplex.ops.numba_lanes import add, divide, log, splat, subtract
from loraplex.ops.numba_threads import run_workers
from loraplex.ops.numba_types import (
    BITS,
    FLOAT32,
    I32,
    LANES,
    VECTOR,
    constant,
    emit_splat,
    first_lanes,
    float32x16,
    inline,
    intrinsic,
    jit,
    llvm_call,
    load_first,
    poke,
    read_float32,
    read_int64,
    store_first,
)


def _fmix32(builder: Any, x: Any) -> Any:
    """The finaliser of MurmurHash3, as `noise._fmix32`."""
    for multiplier, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
        x = builder.mul(builder.xor(x, builder.lshr(x, constant(BITS, shift))), constant(BITS, multiplier))
    return builder.xor(x, builder.lshr(x, constant(BITS, 16)))


@intrinsic
def uniforms(typingctx: Any, first: Any, low: Any, high: Any) -> Any:
    """u in (0, 1) of the tokens first..first + 15 under the key high · 2³² + low."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        start, low, high = (emit_splat(builder, builder.trunc(arg, I32), BITS) for arg in args)
        token = builder.add(start, ir.Constant(BITS, list(range(LANES))))
        bits = _fmix32(builder, builder.xor(_fmix32(builder, builder.xor(token, low)), high))
        u = builder.fmul(builder.fadd(builder.uitofp(bits, VECTOR), constant(VECTOR, 0.5)), constant(VECTOR, 2.0**-32))
        return llvm_call(builder, "minnum", u, constant(VECTOR, 1 - 2.0**-24))

    return float32x16(types.int64, types.int64, types.int64), codegen


@intrinsic
def token_lanes(typingctx: Any, first: Any) -> Any:
    """first..first + 15 as float32: exact below 2²⁴, more than any vocabulary has."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        start = emit_splat(builder, builder.trunc(args[0], I32), BITS)
        return builder.sitofp(builder.add(start, ir.Constant(BITS, list(range(LANES)))), VECTOR)

    return float32x16(types.int64), codegen


@intrinsic
def where_greater(typingctx: Any, a: Any, b: Any, x: Any, y: Any) -> Any:
    """x in the lanes where a > b, y in the others."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered(">", args[0], args[1]), args[2], args[3])

    return float32x16(*[float32x16] * 4), codegen


@intrinsic
def only_first(typingctx: Any, value: Any, count: Any) -> Any:
    """`value` in the first `count` lanes, -inf in the others."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(first_lanes(builder, args[1]), args[0], constant(VECTOR, float("-inf")))

    return float32x16(float32x16, types.int64), codegen


@inline
def _gumbel(first: int, low: int, high: int) -> Any:
    """-log(-log1p(-u)). log1p(x) = log(y) + (x - (y - 1)) / y with y = 1 + x, which holds for the smallest x, too."""
    zero, one = splat(np.float32(0)), splat(np.float32(1))
    x = subtract(zero, uniforms(first, low, high))
    y = add(one, x)
    log1p = add(log(y), divide(subtract(x, subtract(y, one)), y))
    return subtract(zero, log(subtract(zero, log1p)))


@jit
def draw_share(
    worker: int,
    logits: int,
    stride: int,
    rows: int,
    vocabulary: int,
    low: int,
    high: int,
    out: int,
    scratch: int,
    workers: int,
) -> None:
    """Rows worker, worker + workers, … of `out`. Each worker has 2 · LANES float32 of `scratch`."""
    values, ids = scratch + worker * 8 * LANES, scratch + worker * 8 * LANES + 4 * LANES
    for row in range(worker, rows, workers):
        best, token = splat(np.float32(-np.inf)), splat(np.float32(0))
        row_low, row_high = read_int64(low, row), read_int64(high, row)
        for first in range(0, vocabulary, LANES):
            count = vocabulary - first
            logit = only_first(load_first(FLOAT32, logits + row * stride + 4 * first, count), count)
            value = add(logit, _gumbel(first, row_low, row_high))
            token = where_greater(value, best, token_lanes(first), token)
            best = where_greater(value, best, value, best)
        store_first(FLOAT32, values, best, LANES)
        store_first(FLOAT32, ids, token, LANES)
        chosen = 0
        for lane in range(1, LANES):
            value, other = read_float32(values, lane), read_float32(values, chosen)
            if value > other or (value == other and read_float32(ids, lane) < read_float32(ids, chosen)):
                chosen = lane
        poke(out + 8 * row, np.int64(read_float32(ids, chosen)))


@jit
def draw(
    logits: int, stride: int, rows: int, vocabulary: int, low: int, high: int, out: int, scratch: int, workers: int
) -> None:
    """out[r] = argmax over v of logits[r, v] + noise(key r, v); `low` and `high` are the keys' halves, int64 [rows]."""
    run_workers(draw_share, workers, (logits, stride, rows, vocabulary, low, high, out, scratch, workers))
