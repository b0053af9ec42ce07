"""What a decoder does row by row between its products, on a CPU: RMS norms and gated activations.

In one pass over the row, with torch's roundings: what torch would write to memory in bfloat16 on the way is rounded
here, too. The squares of a row are summed by sixteen lanes, k ≡ lane (mod 16) in order, and folded as a fixed tree.
"""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false
# (llvmlite and numba's extension API carry no usable types)

import math
from typing import Any

import numpy as np
from numba.core import types

from loraplex.ops.numba_lanes import add, divide, exp, multiply, multiply_add, splat, subtract, sum_lanes
from loraplex.ops.numba_sampling import where_greater
from loraplex.ops.numba_threads import run_workers
from loraplex.ops.numba_types import (
    LANES,
    float32x16,
    inline,
    intrinsic,
    jit,
    load_first,
    round_lanes,
    size_of,
    store_first,
)

ZERO, ONE = np.float32(0), np.float32(1)


@intrinsic
def rounded(typingctx: Any, element: Any, value: Any) -> Any:
    """`value` as it would be read again after being written as `element`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return args[1] if element == types.float32 else round_lanes(builder, args[1])

    return float32x16(element, float32x16), codegen


@jit
def rms_norm_share(
    worker: int,
    element: Any,
    x: int,
    weight: int,
    out: int,
    rows: int,
    size: int,
    eps: float,
    plus_one: bool,
    workers: int,
) -> None:
    """One of `workers` equal shares of the rows."""
    share = (rows + workers - 1) // workers
    stride = size * size_of(element)
    for row in range(worker * share, min(rows, worker * share + share)):
        source, target = x + row * stride, out + row * stride
        squares = splat(ZERO)
        for k in range(0, size, LANES):
            v = load_first(element, source + k * size_of(element), size - k)
            squares = multiply_add(v, v, squares)
        scale = splat(np.float32(1.0 / math.sqrt(sum_lanes(squares) / np.float32(size) + eps)))
        for k in range(0, size, LANES):
            at, count = k * size_of(element), size - k
            v = multiply(load_first(element, source + at, count), scale)
            w = load_first(element, weight + at, count)
            v = multiply(v, add(w, splat(ONE))) if plus_one else multiply(rounded(element, v), w)
            store_first(element, target + at, v, min(LANES, count))


@jit
def rms_norm(
    element: Any, x: int, weight: int, out: int, rows: int, size: int, eps: float, plus_one: bool, workers: int
) -> None:
    """out[r] = weight · x[r] / sqrt(mean(x[r]²) + eps), or (1 + weight) · …; contiguous rows of `size`."""
    share = (element, x, weight, out, rows, size, np.float32(eps), plus_one, workers)
    run_workers(rms_norm_share, workers, share)


@inline
def _silu(x: Any) -> Any:
    """x · sigmoid(x), with e = exp(-|x|): 1 / (1 + e) above zero, e / (1 + e) below."""
    zero, one = splat(ZERO), splat(ONE)
    e = exp(where_greater(x, zero, subtract(zero, x), x))
    return multiply(x, divide(where_greater(x, zero, one, e), add(one, e)))


@jit
def silu_mul_share(
    worker: int,
    element: Any,
    gate: int,
    gate_stride: int,
    up: int,
    up_stride: int,
    out: int,
    rows: int,
    size: int,
    workers: int,
) -> None:
    """One of `workers` equal shares of the rows."""
    share = (rows + workers - 1) // workers
    for row in range(worker * share, min(rows, worker * share + share)):
        for k in range(0, size, LANES):
            at, count = k * size_of(element), size - k
            a = rounded(element, _silu(load_first(element, gate + row * gate_stride + at, count)))
            b = load_first(element, up + row * up_stride + at, count)
            store_first(element, out + row * size * size_of(element) + at, multiply(a, b), min(LANES, count))


@jit
def silu_mul(
    element: Any, gate: int, gate_stride: int, up: int, up_stride: int, out: int, rows: int, size: int, workers: int
) -> None:
    """out[r] = silu(gate[r]) · up[r]; `out` is contiguous, the others have strides in bytes."""
    run_workers(silu_mul_share, workers, (element, gate, gate_stride, up, up_stride, out, rows, size, workers))
