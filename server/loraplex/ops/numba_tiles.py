"""x·Wᵀ on a CPU with AMX tiles: bfloat16 matrices, float32 sums, the same bits for a row in every batch.

A tile is 16 rows of 64 bytes. x is copied into tiles of 16 rows × 32 features, the weight was packed once into tiles
of 32 features × 16 outputs, a pair of features side by side (`pack_tiles`). A row's sum takes 32 features after the
other in order, whatever row of whatever tile it is; those of oneDNN, which chooses a blocking by the number of rows, do
not (Intel 64 and IA-32 Architectures Software Developer's Manual, vol. 2, TDPBF16PS, states the order within a tile).

A worker takes panels of 32 outputs. With few rows the weight streams through once, its next tiles asked for ahead; with
many, a piece of the panel that fits the first cache serves all rows before the next one, the sums waiting in memory.
"""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false
# (llvmlite and numba's extension API carry no usable types)

import functools
from typing import Any

import torch
from llvmlite import ir
from numba.core import cgutils, types
from torch import Tensor, nn

from loraplex.ops.numba_lanes import add
from loraplex.ops.numba_threads import SERIAL_WORK, run_workers
from loraplex.ops.numba_types import (
    BFLOAT16,
    FLOAT32,
    copy_bytes,
    inline,
    intrinsic,
    jit,
    load,
    load_first,
    store_first,
)

ROWS = 16  # of a tile
FEATURES = 32  # bfloat16 in a row of a tile
PANEL = 32  # outputs that are summed side by side: two tiles
_TILE = 1024  # bytes
_STEPS = 8  # tiles of features in a piece of a panel: 16 KiB
_AHEAD, _LINES = 2048, 256  # the weight is asked for this many bytes ahead, one address in so many

_I1, _I8, _I32, _I64 = ir.IntType(1), ir.IntType(8), ir.IntType(32), ir.IntType(64)
_POINTER = _I8.as_pointer()


@functools.cache
def has_tiles() -> bool:
    """Whether this CPU and its operating system let the process use AMX with bfloat16; asks for the permission."""
    capabilities = torch.cpu.get_capabilities()
    request = getattr(torch.cpu, "_init_amx", lambda: False)
    return bool(capabilities.get("amx_tile") and capabilities.get("amx_bf16") and request())


def pack_tiles(weight: Tensor) -> Tensor:
    """bfloat16 [out, in] -> a new flat tensor: panels of 32 outputs, in each the tiles of 32 features in order, two
    tiles of 16 outputs side by side; missing outputs and features are zeros."""
    outputs, features = weight.shape
    whole = nn.functional.pad(weight, (0, -features % FEATURES, 0, -outputs % PANEL))
    tiles = whole.view(whole.shape[0] // PANEL, 2, 16, whole.shape[1] // FEATURES, 16, 2)
    return tiles.permute(0, 3, 1, 4, 2, 5).reshape(-1)


def unpack_tiles(packed: Tensor, outputs: int, features: int) -> Tensor:
    """The inverse: a new [out, in]."""
    steps = -(-features // FEATURES)
    whole = packed.view(-1, steps, 2, 16, 16, 2).permute(0, 2, 4, 1, 3, 5).reshape(-1, steps * FEATURES)
    return whole[:outputs, :features].clone()


def multiply_tiles(x: Tensor, packed: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    """x bfloat16 [M, in], any row stride, a packed weight and a bias float32 [out] -> new bfloat16 [M, out]."""
    rows, features = x.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    steps = -(-features // FEATURES)
    y = torch.empty(rows, outputs, dtype=x.dtype)
    workers = 1 if rows * features * outputs < SERIAL_WORK * 8 else torch.get_num_threads()
    tiles = torch.empty(-(-rows // ROWS) * steps * _TILE, dtype=torch.uint8)
    words = PANEL * -(-rows // (2 * ROWS)) * 2 * ROWS
    sums = torch.empty(workers, words, dtype=torch.float32)
    product(
        x.data_ptr(),
        x.stride(0) * 2,
        rows,
        features,
        tiles.data_ptr(),
        packed.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        outputs,
        sums.data_ptr(),
        4 * words,
        workers,
    )
    return y


def _call(builder: Any, name: str, *operands: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [operand.type for operand in operands])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}"), operands)


@intrinsic
def begin_tiles(typingctx: Any) -> Any:
    """Let the calling thread use its eight tiles, 16 rows of 64 bytes each; ended by `end_tiles`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        palette = [1] + [0] * 15 + [64, 0] * 8 + [0] * 16 + [16] * 8 + [0] * 8
        kind = ir.ArrayType(_I8, 64)
        where = cgutils.alloca_once_value(builder, ir.Constant(kind, palette))
        _call(builder, "x86.ldtilecfg", builder.bitcast(where, _POINTER))
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def end_tiles(typingctx: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _call(builder, "x86.tilerelease")
        return context.get_dummy_value()

    return types.void(), codegen


def _make_sum_tiles(row_tiles: int) -> Any:
    @intrinsic
    def sum_tiles(typingctx: Any, x: Any, x_stride: Any, weight: Any, steps: Any, is_first: Any, sums: Any) -> Any:
        """sums [16 · row_tiles, 32] += the next `steps` tiles of features of x's tiles, whose next 16 rows lie
        `x_stride` bytes further on, times the panel's; begun at zero if `is_first`."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            x, x_stride, weight, steps, is_first, sums = args

            def at(address: Any, offset: int) -> Any:
                return builder.inttoptr(builder.add(address, _I64(offset)), _POINTER)

            # tiles 0 to 3: sums of (row tile i, outputs j); 4, 5: x's; 6, 7: the panel's
            totals = [
                (_I8(2 * i + j), at(sums, 2048 * i + 64 * j), _I64(128)) for i in range(row_tiles) for j in (0, 1)
            ]
            with builder.if_else(builder.trunc(is_first, _I1)) as (begin, go_on):
                with begin:
                    for tile, _, _ in totals:
                        _call(builder, "x86.tilezero", tile)
                with go_on:
                    for total in totals:
                        _call(builder, "x86.tileloadd64", *total)
            with cgutils.for_range(builder, steps, intp=_I64) as loop:
                panel = builder.add(weight, builder.mul(loop.index, _I64(2 * _TILE)))
                row = builder.add(x, builder.mul(loop.index, _I64(_TILE)))
                for line in range(0, 2 * _TILE, _LINES):
                    _call(builder, "prefetch.p0", at(panel, _AHEAD + line), _I32(0), _I32(3), _I32(1))
                for j in (0, 1):
                    _call(builder, "x86.tileloadd64", _I8(6 + j), at(panel, j * _TILE), _I64(64))
                for i in range(row_tiles):
                    _call(builder, "x86.tileloadd64", _I8(4 + i), at(row, 0), _I64(64))
                    row = builder.add(row, x_stride)
                    for j in (0, 1):
                        _call(builder, "x86.tdpbf16ps", _I8(2 * i + j), _I8(4 + i), _I8(6 + j))
            for total in totals:
                _call(builder, "x86.tilestored64", *total)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4, types.boolean, types.int64), codegen

    return sum_tiles


sum_16_rows, sum_32_rows = _make_sum_tiles(1), _make_sum_tiles(2)


@jit
def copy_share(worker: int, x: int, x_stride: int, rows: int, features: int, tiles: int, workers: int) -> None:
    """One of `workers` shares of x's rows, copied into tiles; features that are missing in the last are zeros."""
    steps = (features + FEATURES - 1) // FEATURES
    whole = features // FEATURES
    for row in range(worker, rows, workers):
        to, source = tiles + row // ROWS * steps * _TILE + row % ROWS * 64, x + row * x_stride
        for k in range(whole):
            copy_bytes(to + k * _TILE, source + k * 64, 64)
        for k in range(whole, steps):
            for part in range(0, FEATURES, 16):
                count = min(16, max(0, features - k * FEATURES - part))
                values = load_first(BFLOAT16, source + k * 64 + 2 * part, count)
                store_first(BFLOAT16, to + k * _TILE + 2 * part, values, 16)


@inline
def _write(y: int, total: int, bias: int, column: int, outputs: int) -> None:
    """y[0:32] = the sums of a row in a panel, with the bias, rounded."""
    for part in range(0, PANEL, 16):
        value = load(FLOAT32, total + 4 * part)
        count = outputs - column - part
        if count >= 16:
            if bias != 0:
                value = add(value, load(FLOAT32, bias + 4 * (column + part)))
            store_first(BFLOAT16, y + 2 * part, value, 16)
        elif count > 0:
            if bias != 0:
                value = add(value, load_first(FLOAT32, bias + 4 * (column + part), count))
            store_first(BFLOAT16, y + 2 * part, value, count)


@jit
def product_share(
    worker: int,
    rows: int,
    features: int,
    tiles: int,
    weight: int,
    bias: int,
    y: int,
    outputs: int,
    sums: int,
    sums_size: int,
    workers: int,
) -> None:
    """One of `workers` shares of the panels of outputs."""
    steps = (features + FEATURES - 1) // FEATURES
    sums = sums + worker * sums_size
    piece = _STEPS if rows > 2 * ROWS else steps
    panels = (outputs + PANEL - 1) // PANEL
    share = (panels + workers - 1) // workers
    begin_tiles()
    for panel in range(worker * share, min(panels, worker * share + share)):
        column = panel * PANEL
        for k in range(0, steps, piece):
            count = min(piece, steps - k)
            w = weight + (panel * steps + k) * 2 * _TILE
            for row in range(0, rows, 2 * ROWS):
                a, total = tiles + (row // ROWS * steps + k) * _TILE, sums + row * 4 * PANEL
                if row + ROWS >= rows:
                    sum_16_rows(a, 0, w, count, k == 0, total)
                else:
                    sum_32_rows(a, steps * _TILE, w, count, k == 0, total)
                if k + count == steps:
                    for t in range(min(2 * ROWS, rows - row)):
                        out = y + ((row + t) * outputs + column) * 2
                        _write(out, total + 4 * PANEL * t, bias, column, outputs)
    end_tiles()


@jit
def product(
    x: int,
    x_stride: int,
    rows: int,
    features: int,
    tiles: int,
    weight: int,
    bias: int,
    y: int,
    outputs: int,
    sums: int,
    sums_size: int,
    workers: int,
) -> None:
    """y = x·Wᵀ + bias; the rows of x and then the panels of outputs are split among `workers`."""
    run_workers(copy_share, workers, (x, x_stride, rows, features, tiles, workers))
    run_workers(product_share, workers, (rows, features, tiles, weight, bias, y, outputs, sums, sums_size, workers))
