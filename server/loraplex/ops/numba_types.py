"""Sixteen float32 lanes as a numba type, and the handful of instructions the kernels are written in.

Everything here is explicit SIMD: an intrinsic emits the vector instruction itself, no auto-vectoriser decides, no
fastmath reorders. So the order of every sum is the one written in the kernel: it depends on the length of the sum
alone, never on the number of rows, the tile a row falls in or the thread that computes it. LLVM splits the sixteen
lanes where the CPU has narrower registers, with the same result (fused multiply-add is asked for by name).

Memory is addressed by plain integers (`tensor.data_ptr()` + bytes): the adapters lie in as many slabs as there are
adapters, and an int64 costs a call a few nanoseconds where an array costs a microsecond. `element` says what lies
there: a float32 scalar for float32, a uint16 scalar for bfloat16 (numpy has no bfloat16; its bits are the upper half
of a float32's). Only the type of `element` is used.
"""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportIncompatibleMethodOverride=false
# (llvmlite and numba's extension API carry no usable types)

import hashlib
from collections.abc import Callable
from pathlib import Path
from types import CellType, FunctionType
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import extending
from numba.core import cgutils, types
from numba.extending import models, register_model

LANES = 16
intrinsic: Any = extending.intrinsic  # its annotations do not say that numba passes the first argument
FLOAT32 = np.float32(0)
BFLOAT16 = np.uint16(0)

F32 = ir.FloatType()
I16, I32 = ir.IntType(16), ir.IntType(32)
VECTOR = ir.VectorType(F32, LANES)
BITS = ir.VectorType(I32, LANES)
HALVES = ir.VectorType(I16, LANES)


class Float32x16(types.Type):
    """The numba type of one vector of LANES float32."""

    def __init__(self) -> None:
        super().__init__(name="float32x16")


float32x16 = Float32x16()


@register_model(Float32x16)
class _Float32x16Model(models.PrimitiveModel):
    def __init__(self, manager: Any, fe_type: Float32x16) -> None:
        super().__init__(manager, fe_type, VECTOR)


def _digest_of_sources() -> str:
    """SHA-256 of the kernel sources of this package."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("numba_*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


SOURCES = _digest_of_sources()


def jit(function: Callable) -> Callable:
    """A kernel: compiled with the GIL released, its machine code cached on disk where any place is writable.

    numba takes a cached kernel for fresh when the kernel's own file is unchanged, though it inlines functions of
    other files. It also compares what a function closes over: so each kernel closes over the digest of all sources.
    """
    function = FunctionType(
        function.__code__.replace(co_freevars=("sources",)),
        function.__globals__,
        function.__name__,
        closure=(CellType(SOURCES),),
    )
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # "cannot cache function: no locator available": read-only everywhere
        return numba.njit(nogil=True)(function)


inline = numba.njit(nogil=True, forceinline=True)


# Building blocks in LLVM's terms


def constant(kind: ir.VectorType, value: float) -> ir.Constant:
    return ir.Constant(kind, [value] * LANES)


def emit_splat(builder: Any, value: Any, kind: ir.VectorType) -> Any:
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, I32(0))
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(BITS, [0] * LANES))


def llvm_call(builder: Any, name: str, *operands: Any) -> Any:
    """The LLVM intrinsic `name` on vectors of float32."""
    kind = ir.FunctionType(VECTOR, [operand.type for operand in operands])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v16f32"), operands)


def first_lanes(builder: Any, count: Any) -> Any:
    """The mask of the first `count` lanes (int64)."""
    lanes = ir.Constant(BITS, list(range(LANES)))
    return builder.icmp_signed("<", lanes, emit_splat(builder, builder.trunc(count, I32), BITS))


def _masked_load(builder: Any, address: Any, kind: ir.VectorType, align: int, mask: Any) -> Any:
    pointer = builder.inttoptr(address, kind.as_pointer())
    name = f"llvm.masked.load.v16{'f32' if kind is VECTOR else 'i16'}.p0"
    signature = ir.FunctionType(kind, [pointer.type, I32, mask.type, kind])
    load = cgutils.get_or_insert_function(builder.module, signature, name)
    return builder.call(load, [pointer, I32(align), mask, ir.Constant(kind, None)])


def _masked_store(builder: Any, value: Any, address: Any, align: int, mask: Any) -> None:
    pointer = builder.inttoptr(address, value.type.as_pointer())
    name = f"llvm.masked.store.v16{'f32' if value.type == VECTOR else 'i16'}.p0"
    signature = ir.FunctionType(ir.VoidType(), [value.type, pointer.type, I32, mask.type])
    builder.call(cgutils.get_or_insert_function(builder.module, signature, name), [value, pointer, I32(align), mask])


def _widen(builder: Any, halves: Any) -> Any:
    """bfloat16 -> float32: exact, the bits are the upper half."""
    return builder.bitcast(builder.shl(builder.zext(halves, BITS), constant(BITS, 16)), VECTOR)


def _narrow(builder: Any, value: Any) -> Any:
    """float32 -> bfloat16, to nearest, ties to even, NaN stays NaN: as torch rounds."""
    bits = builder.bitcast(value, BITS)
    odd = builder.and_(builder.lshr(bits, constant(BITS, 16)), constant(BITS, 1))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, constant(BITS, 0x7FFF))), constant(BITS, 16))
    is_nan = builder.fcmp_unordered("uno", value, value)
    return builder.trunc(builder.select(is_nan, constant(BITS, 0x7FC0), rounded), HALVES)


def round_lanes(builder: Any, value: Any) -> Any:
    """float32 -> the nearest bfloat16, as float32."""
    return _widen(builder, _narrow(builder, value))


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
            return builder.load(builder.inttoptr(args[1], VECTOR.as_pointer()), align=4)
        return _widen(builder, builder.load(builder.inttoptr(args[1], HALVES.as_pointer()), align=2))

    return float32x16(element, types.int64), codegen


@intrinsic
def load_first(typingctx: Any, element: Any, address: Any, count: Any) -> Any:
    """The `count` elements at `address`, widened, zeros after them; reads nothing past them."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        mask = first_lanes(builder, args[2])
        if element == types.float32:
            return _masked_load(builder, args[1], VECTOR, 4, mask)
        return _widen(builder, _masked_load(builder, args[1], HALVES, 2, mask))

    return float32x16(element, types.int64, types.int64), codegen


@intrinsic
def store_first(typingctx: Any, element: Any, address: Any, value: Any, count: Any) -> Any:
    """Write the first `count` lanes at `address`, rounded to `element`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = args[2] if element == types.float32 else _narrow(builder, args[2])
        _masked_store(builder, bits, args[1], 4 if element == types.float32 else 2, first_lanes(builder, args[3]))
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
        cgutils.raw_memcpy(builder, builder.inttoptr(args[0], kind), builder.inttoptr(args[1], kind), args[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def prefetch(typingctx: Any, address: Any) -> Any:
    """Ask for the cache line at `address`; nothing is read, and no address is a fault."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [pointer, I32(0), I32(3), I32(1)])  # to read, into the first cache, data
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@inline
def load_lanes(element: Any, address: int, count: int, whole: bool) -> Any:
    """load if `whole` (a constant where this is called: no branch remains), else load_first."""
    if whole:
        return load(element, address)
    return load_first(element, address, count)


@inline
def read_int32(column: int, index: int) -> int:
    return int(peek(np.int32(0), column + 4 * index))


@inline
def read_int64(column: int, index: int) -> int:
    return peek(np.int64(0), column + 8 * index)


@inline
def read_float32(column: int, index: int) -> float:
    return peek(np.float32(0), column + 4 * index)
