"""Arithmetic on sixteen float32 lanes: lane by lane, and across the lanes in a fixed tree."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false
# (llvmlite and numba's extension API carry no usable types)

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types

from loraplex.ops.numba_types import (
    BITS,
    I32,
    VECTOR,
    constant,
    emit_splat,
    first_lanes,
    float32x16,
    intrinsic,
    llvm_call,
)


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


multiply_add = _lanewise(lambda builder, a, b, c: llvm_call(builder, "fma", a, b, c), 3)
multiply = _lanewise(lambda builder, a, b: builder.fmul(a, b), 2)
add = _lanewise(lambda builder, a, b: builder.fadd(a, b), 2)
subtract = _lanewise(lambda builder, a, b: builder.fsub(a, b), 2)
divide = _lanewise(lambda builder, a, b: builder.fdiv(a, b), 2)
maximum = _lanewise(lambda builder, a, b: llvm_call(builder, "maxnum", a, b), 2)


@intrinsic
def splat(typingctx: Any, value: Any) -> Any:
    """`value` in every lane."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return emit_splat(builder, args[0], VECTOR)

    return float32x16(types.float32), codegen


@intrinsic
def keep_between(typingctx: Any, value: Any, low: Any, high: Any) -> Any:
    """`value` in the lanes low..high, both included, -inf in the others."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        from_low = builder.not_(first_lanes(builder, args[1]))
        to_high = first_lanes(builder, builder.add(args[2], ir.Constant(args[2].type, 1)))
        return builder.select(builder.and_(from_low, to_high), args[0], constant(VECTOR, float("-inf")))

    return float32x16(float32x16, types.int64, types.int64), codegen


def _polynomial(builder: Any, x: Any, coefficients: list[float]) -> Any:
    """Horner's scheme, highest power first."""
    result = constant(VECTOR, coefficients[0])
    for coefficient in coefficients[1:]:
        result = llvm_call(builder, "fma", result, x, constant(VECTOR, coefficient))
    return result


def _exp(builder: Any, x: Any) -> Any:
    """exp for x <= 0, within 2 ulp; 0 below -87, NaN of NaN. exp(x) = 2ⁿ · exp(r), n = round(x / ln 2), |r| <= ln 2 / 2
    (Cephes, expf: the same split of ln 2 and polynomial)."""
    lowest = constant(VECTOR, -87.0)
    clamped = llvm_call(builder, "maxnum", x, lowest)
    n = llvm_call(builder, "rint", builder.fmul(clamped, constant(VECTOR, 1.44269504088896341)))
    r = llvm_call(builder, "fma", n, constant(VECTOR, -0.693359375), clamped)
    r = llvm_call(builder, "fma", n, constant(VECTOR, 2.12194440e-4), r)
    series = [1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5]
    one_plus_r = builder.fadd(r, constant(VECTOR, 1.0))
    e = llvm_call(builder, "fma", _polynomial(builder, r, series), builder.fmul(r, r), one_plus_r)
    exponent = builder.shl(builder.fptosi(n, BITS), constant(BITS, 23))
    scaled = builder.bitcast(builder.add(builder.bitcast(e, BITS), exponent), VECTOR)
    bounded = builder.select(builder.fcmp_ordered("<", x, lowest), constant(VECTOR, 0.0), scaled)
    return builder.select(builder.fcmp_unordered("uno", x, x), x, bounded)


def _tanh(builder: Any, x: Any) -> Any:
    """tanh within 3 ulp: x + x³ P(x²) below 0.625, 1 - 2 / (exp(2 |x|) + 1) above (Cephes, tanhf)."""
    size = llvm_call(builder, "fabs", x)
    e = _exp(builder, builder.fmul(size, constant(VECTOR, -2.0)))
    one = constant(VECTOR, 1.0)
    large = builder.fdiv(builder.fsub(one, e), builder.fadd(one, e))
    square = builder.fmul(x, x)
    series = [-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1]
    small = llvm_call(builder, "fma", _polynomial(builder, square, series), builder.fmul(square, x), x)
    is_small = builder.fcmp_ordered("<", size, constant(VECTOR, 0.625))
    return builder.select(is_small, small, llvm_call(builder, "copysign", large, x))


def _log(builder: Any, x: Any) -> Any:
    """log of a positive normal number, within 2 ulp (Cephes, logf): log(m · 2ᵉ) with m in [√½, √2)."""
    bits = builder.bitcast(x, BITS)
    exponent = builder.sub(builder.lshr(bits, constant(BITS, 23)), constant(BITS, 126))
    mantissa = builder.or_(builder.and_(bits, constant(BITS, 0x7FFFFF)), constant(BITS, 0x3F000000))
    m = builder.bitcast(mantissa, VECTOR)  # in [½, 1)
    is_low = builder.fcmp_ordered("<", m, constant(VECTOR, 0.707106781186547524))
    e = builder.sitofp(builder.sub(exponent, builder.zext(is_low, BITS)), VECTOR)
    one = constant(VECTOR, 1.0)
    m = builder.fsub(builder.select(is_low, builder.fadd(m, m), m), one)
    square = builder.fmul(m, m)
    series = [7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1]
    series += [-1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1]
    tail = builder.fmul(builder.fmul(_polynomial(builder, m, series), square), m)
    tail = llvm_call(builder, "fma", e, constant(VECTOR, -2.12194440e-4), tail)
    tail = llvm_call(builder, "fma", square, constant(VECTOR, -0.5), tail)
    return llvm_call(builder, "fma", e, constant(VECTOR, 0.693359375), builder.fadd(m, tail))


exp = _lanewise(_exp, 1)
log = _lanewise(_log, 1)
tanh = _lanewise(_tanh, 1)


# Across lanes


def _pick(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


def _fold(builder: Any, value: Any, join: Callable[[Any, Any], Any]) -> Any:
    """One scalar from sixteen lanes, halves joined with halves: a fixed tree."""
    for half in (8, 4, 2, 1):
        value = join(
            _pick(builder, value, value, list(range(half))),
            _pick(builder, value, value, list(range(half, 2 * half))),
        )
    return builder.extract_element(value, I32(0))


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

        quarters = halve(halve(args[1], args[2], 16), halve(args[3], args[4], 16), 8)  # 4 lanes each of a b c d
        undefined = ir.Constant(VECTOR, ir.Undefined)
        sums = halve(halve(quarters, undefined, 4), undefined, 2)
        four = _pick(builder, sums, undefined, [0, 1, 2, 3])
        builder.store(four, builder.inttoptr(args[0], four.type.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, *[float32x16] * 4), codegen
