"""Sixteen float32 lanes as a numba type, and the handful of instructions the kernels are written in.

Everything here is explicit SIMD: an intrinsic emits the vector instruction itself, no auto-vectoriser decides, no
fastmath reorders. So the order of every sum is the one written in the kernel: it depends on the length of the sum
alone, never on the number of rows, the tile a row falls in or the thread that computes it. LLVM splits the sixteen
lanes where the CPU has narrower registers, with the same result (fused multiply-add is asked for by name).

Memory is addressed by plain integers (`tensor.data_ptr()` + bytes): the adapters lie in as many slabs as there are
adapters, and an int64 costs a call a few nanoseconds where an array costs a microsecond. `element` says what lies
there: a float32 scalar for float32, a uint16 scalar for bfloat16 (numpy has no bfloat16; its bits are the upper half
of a float32's). Only the type of `element` is used.

Kernels are cached on disk by the stamp of their own file; after an edit of this file, empty NUMBA_CACHE_DIR.
"""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportIncompatibleMethodOverride=false
# (llvmlite and numba's extension API carry no usable types)

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, models, register_model

LANES = 16
FLOAT32 = np.float32(0)
BFLOAT16 = np.uint16(0)

_F32 = ir.FloatType()
_I1, _I16, _I32 = ir.IntType(1), ir.IntType(16), ir.IntType(32)
_VECTOR = ir.VectorType(_F32, LANES)
_BITS = ir.VectorType(_I32, LANES)
_HALVES = ir.VectorType(_I16, LANES)


class Float32x16(types.Type):
    """The numba type of one vector of LANES float32."""

    def __init__(self) -> None:
        super().__init__(name="float32x16")


float32x16 = Float32x16()


@register_model(Float32x16)
class _Float32x16Model(models.PrimitiveModel):
    def __init__(self, manager: Any, fe_type: Float32x16) -> None:
        super().__init__(manager, fe_type, _VECTOR)


def jit(function: Callable) -> Callable:
    """A kernel: compiled with the GIL released, the machine code cached on disk where any place is writable."""
    return _cached(function, parallel=False)


def parallel_jit(function: Callable) -> Callable:
    """A kernel whose `prange` loops are spread over numba's threads."""
    return _cached(function, parallel=True)


def _cached(function: Callable, **options: Any) -> Callable:
    try:
        return numba.njit(nogil=True, cache=True, **options)(function)
    except RuntimeError:  # "cannot cache function: no locator available": read-only everywhere
        return numba.njit(nogil=True, **options)(function)


inline = numba.njit(nogil=True, forceinline=True)


# Building blocks in LLVM's terms


def _constant(kind: ir.VectorType, value: float) -> ir.Constant:
    return ir.Constant(kind, [value] * LANES)


def _splat(builder: Any, value: Any, kind: ir.VectorType) -> Any:
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, _I32(0))
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(_BITS, [0] * LANES))


def _call(builder: Any, name: str, *operands: Any) -> Any:
    """The LLVM intrinsic `name` on vectors of float32."""
    kind = ir.FunctionType(_VECTOR, [operand.type for operand in operands])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v16f32"), operands)


def _first(builder: Any, count: Any) -> Any:
    """The mask of the first `count` lanes (int64)."""
    lanes = ir.Constant(_BITS, list(range(LANES)))
    return builder.icmp_signed("<", lanes, _splat(builder, builder.trunc(count, _I32), _BITS))


def _masked_load(builder: Any, address: Any, kind: ir.VectorType, align: int, mask: Any) -> Any:
    pointer = builder.inttoptr(address, kind.as_pointer())
    name = f"llvm.masked.load.v16{'f32' if kind is _VECTOR else 'i16'}.p0"
    signature = ir.FunctionType(kind, [pointer.type, _I32, mask.type, kind])
    load = cgutils.get_or_insert_function(builder.module, signature, name)
    return builder.call(load, [pointer, _I32(align), mask, ir.Constant(kind, None)])


def _masked_store(builder: Any, value: Any, address: Any, align: int, mask: Any) -> None:
    pointer = builder.inttoptr(address, value.type.as_pointer())
    name = f"llvm.masked.store.v16{'f32' if value.type == _VECTOR else 'i16'}.p0"
    signature = ir.FunctionType(ir.VoidType(), [value.type, pointer.type, _I32, mask.type])
    builder.call(
        cgutils.get_or_insert_function(builder.module, signature, name), [value, pointer, _I32(align), mask]
    )


def _widen(builder: Any, halves: Any) -> Any:
    """bfloat16 -> float32: exact, the bits are the upper half."""
    return builder.bitcast(builder.shl(builder.zext(halves, _BITS), _constant(_BITS, 16)), _VECTOR)


def _narrow(builder: Any, value: Any) -> Any:
    """float32 -> bfloat16, to nearest, ties to even, NaN stays NaN: as torch rounds."""
    bits = builder.bitcast(value, _BITS)
    odd = builder.and_(builder.lshr(bits, _constant(_BITS, 16)), _constant(_BITS, 1))
    rounded = builder.lshr(
        builder.add(bits, builder.add(odd, _constant(_BITS, 0x7FFF))), _constant(_BITS, 16)
    )
    is_nan = builder.fcmp_unordered("uno", value, value)
    return builder.trunc(builder.select(is_nan, _constant(_BITS, 0x7FC0), rounded), _HALVES)


# Memory


@intrinsic
def size_of(typingctx: Any, element: Any) -> Any:
    """Bytes of an element, a constant."""
    size = 4 if element == types.float32 else 2
    return types.int64(element), lambda context, builder, signature, args: ir.Constant(ir.IntType(64), size)


@intrinsic
def load(typingctx: Any, element: Any, address: Any) -> Any:
    """Sixteen elements at `address`, widened."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if element == types.float32:
            return builder.load(builder.inttoptr(args[1], _VECTOR.as_pointer()), align=4)
        return _widen(builder, builder.load(builder.inttoptr(args[1], _HALVES.as_pointer()), align=2))

    return float32x16(element, types.int64), codegen


@intrinsic
def load_first(typingctx: Any, element: Any, address: Any, count: Any) -> Any:
    """The `count` elements at `address`, widened, zeros after them; reads nothing past them."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        mask = _first(builder, args[2])
        if element == types.float32:
            return _masked_load(builder, args[1], _VECTOR, 4, mask)
        return _widen(builder, _masked_load(builder, args[1], _HALVES, 2, mask))

    return float32x16(element, types.int64, types.int64), codegen


@intrinsic
def store_first(typingctx: Any, element: Any, address: Any, value: Any, count: Any) -> Any:
    """Write the first `count` lanes at `address`, rounded to `element`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = args[2] if element == types.float32 else _narrow(builder, args[2])
        _masked_store(builder, bits, args[1], 4 if element == types.float32 else 2, _first(builder, args[3]))
        return context.get_dummy_value()

    return types.void(element, types.int64, float32x16, types.int64), codegen


@intrinsic
def peek(typingctx: Any, kind: Any, address: Any) -> Any:
    """The scalar at `address`; `kind` is a value of its type (int32, int64 or float32)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(builder.inttoptr(args[1], context.get_value_type(kind).as_pointer()))

    return kind(kind, types.int64), codegen


@intrinsic
def poke(typingctx: Any, address: Any, value: Any) -> Any:
    """Write a scalar (float32 or int64) at `address`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[1], builder.inttoptr(args[0], args[1].type.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.int64, value), codegen


@intrinsic
def copy_bytes(typingctx: Any, target: Any, source: Any, count: Any) -> Any:
    """memcpy of `count` bytes between addresses."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.IntType(8).as_pointer()
        cgutils.raw_memcpy(
            builder, builder.inttoptr(args[0], kind), builder.inttoptr(args[1], kind), args[2], 1
        )
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@inline
def load_lanes(element: Any, address: int, count: int, whole: bool) -> Any:
    """load if `whole` (a constant where this is called: no branch remains), else load_first."""
    if whole:
        return load(element, address)
    return load_first(element, address, count)


@inline
def read_int32(column: int, index: int) -> int:
    return np.int64(peek(np.int32(0), column + 4 * index))


@inline
def read_int64(column: int, index: int) -> int:
    return peek(np.int64(0), column + 8 * index)


@inline
def read_float32(column: int, index: int) -> float:
    return peek(np.float32(0), column + 4 * index)


# Arithmetic, lane by lane


def _lanewise(emit: Callable[..., Any], operands: int) -> Callable:
    """An intrinsic of `operands` vectors; `emit(builder, *values)` writes the instructions."""
    kind = float32x16(*[float32x16] * operands)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return emit(builder, *args)

    if operands == 1:
        return intrinsic(lambda typingctx, a: (kind, codegen))
    if operands == 2:
        return intrinsic(lambda typingctx, a, b: (kind, codegen))
    return intrinsic(lambda typingctx, a, b, c: (kind, codegen))


multiply_add = _lanewise(lambda builder, a, b, c: _call(builder, "fma", a, b, c), 3)
multiply = _lanewise(lambda builder, a, b: builder.fmul(a, b), 2)
add = _lanewise(lambda builder, a, b: builder.fadd(a, b), 2)
subtract = _lanewise(lambda builder, a, b: builder.fsub(a, b), 2)
divide = _lanewise(lambda builder, a, b: builder.fdiv(a, b), 2)
maximum = _lanewise(lambda builder, a, b: _call(builder, "maxnum", a, b), 2)


@intrinsic
def splat(typingctx: Any, value: Any) -> Any:
    """`value` in every lane."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _splat(builder, args[0], _VECTOR)

    return float32x16(types.float32), codegen


@intrinsic
def keep_between(typingctx: Any, value: Any, low: Any, high: Any) -> Any:
    """`value` in the lanes low..high, both included, -inf in the others."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        from_low = builder.not_(_first(builder, args[1]))
        to_high = _first(builder, builder.add(args[2], ir.Constant(args[2].type, 1)))
        return builder.select(builder.and_(from_low, to_high), args[0], _constant(_VECTOR, float("-inf")))

    return float32x16(float32x16, types.int64, types.int64), codegen


def _polynomial(builder: Any, x: Any, coefficients: list[float]) -> Any:
    """Horner's scheme, highest power first."""
    result = _constant(_VECTOR, coefficients[0])
    for coefficient in coefficients[1:]:
        result = _call(builder, "fma", result, x, _constant(_VECTOR, coefficient))
    return result


def _exp(builder: Any, x: Any) -> Any:
    """exp for x <= 0, within 2 ulp; 0 below -87, NaN of NaN. exp(x) = 2ⁿ · exp(r), n = round(x / ln 2), |r| <= ln 2 / 2
    (Cephes, expf: the same split of ln 2 and polynomial)."""
    lowest = _constant(_VECTOR, -87.0)
    clamped = _call(builder, "maxnum", x, lowest)
    n = _call(builder, "rint", builder.fmul(clamped, _constant(_VECTOR, 1.44269504088896341)))
    r = _call(builder, "fma", n, _constant(_VECTOR, -0.693359375), clamped)
    r = _call(builder, "fma", n, _constant(_VECTOR, 2.12194440e-4), r)
    series = [1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5]
    one_plus_r = builder.fadd(r, _constant(_VECTOR, 1.0))
    e = _call(builder, "fma", _polynomial(builder, r, series), builder.fmul(r, r), one_plus_r)
    exponent = builder.shl(builder.fptosi(n, _BITS), _constant(_BITS, 23))
    scaled = builder.bitcast(builder.add(builder.bitcast(e, _BITS), exponent), _VECTOR)
    bounded = builder.select(builder.fcmp_ordered("<", x, lowest), _constant(_VECTOR, 0.0), scaled)
    return builder.select(builder.fcmp_unordered("uno", x, x), x, bounded)


def _tanh(builder: Any, x: Any) -> Any:
    """tanh within 3 ulp: x + x³ P(x²) below 0.625, 1 - 2 / (exp(2 |x|) + 1) above (Cephes, tanhf)."""
    size = _call(builder, "fabs", x)
    e = _exp(builder, builder.fmul(size, _constant(_VECTOR, -2.0)))
    one = _constant(_VECTOR, 1.0)
    large = builder.fdiv(builder.fsub(one, e), builder.fadd(one, e))
    square = builder.fmul(x, x)
    series = [-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1]
    small = _call(builder, "fma", _polynomial(builder, square, series), builder.fmul(square, x), x)
    is_small = builder.fcmp_ordered("<", size, _constant(_VECTOR, 0.625))
    return builder.select(is_small, small, _call(builder, "copysign", large, x))


exp = _lanewise(_exp, 1)
tanh = _lanewise(_tanh, 1)


# Across lanes


def _pick(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(lanes)), lanes))


def _fold(builder: Any, value: Any, join: Callable[[Any, Any], Any]) -> Any:
    """One scalar from sixteen lanes, halves joined with halves: a fixed tree."""
    for half in (8, 4, 2, 1):
        value = join(
            _pick(builder, value, value, list(range(half))),
            _pick(builder, value, value, list(range(half, 2 * half))),
        )
    return builder.extract_element(value, _I32(0))


@intrinsic
def sum_lanes(typingctx: Any, value: Any) -> Any:
    """The sum of the lanes, as a fixed tree of halves."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _fold(builder, args[0], builder.fadd)

    return types.float32(float32x16), codegen


@intrinsic
def max_lanes(typingctx: Any, value: Any) -> Any:
    """The largest lane."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def larger(a: Any, b: Any) -> Any:
            return builder.select(builder.fcmp_ordered(">", a, b), a, b)

        return _fold(builder, args[0], larger)

    return types.float32(float32x16), codegen


@intrinsic
def poke_four_sums(typingctx: Any, address: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Write sum_lanes of a, b, c, d at `address` as four float32: the same tree, four at a time."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def halve(u: Any, v: Any, group: int) -> Any:
            """Fold the upper half of each `group` lanes of u and of v onto the lower; u's before v's."""
            lower = [start + lane for start in range(0, 32, group) for lane in range(group // 2)]
            return builder.fadd(
                _pick(builder, u, v, lower), _pick(builder, u, v, [lane + group // 2 for lane in lower])
            )

        quarters = halve(
            halve(args[1], args[2], 16), halve(args[3], args[4], 16), 8
        )  # 4 lanes each of a b c d
        undefined = ir.Constant(_VECTOR, ir.Undefined)
        sums = halve(halve(quarters, undefined, 4), undefined, 2)
        four = _pick(builder, sums, undefined, [0, 1, 2, 3])
        builder.store(four, builder.inttoptr(args[0], four.type.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, *[float32x16] * 4), codegen
