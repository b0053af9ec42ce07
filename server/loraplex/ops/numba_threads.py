"""Worker threads of the kernels: torch's own OpenMP pool.

numba's OpenMP layer brings a second libgomp, so a second pool: the idle threads of one spin on the cores that the
other needs (on two cores a kernel of 2 ms took 6 to 8). The libgomp that torch has loaded stands in the process's
global symbols; its entry GOMP_parallel (the ABI that gcc compiles `#pragma omp parallel` to) runs our workers on the
very threads that run torch's products. LLVM's libomp, torch's runtime on macOS, exports the same entry.
"""

# pyright: reportAttributeAccessIssue=false
# (llvmlite carries no usable types)

from typing import Any

import llvmlite.binding
import torch  # noqa: F401  loads the OpenMP runtime whose symbols are looked up below
from llvmlite import ir
from numba.core import cgutils, types

from loraplex.ops.numba_types import intrinsic

# Multiply-adds (one thread: some 20 us) below which a second thread costs more than it saves. No result depends on it.
SERIAL_WORK = 500_000

_I32, _I64, _POINTER = ir.IntType(32), ir.IntType(64), ir.IntType(8).as_pointer()


def has_openmp() -> bool:
    """Whether torch's OpenMP runtime can be reached; without it kernels run on the calling thread."""
    return all(
        llvmlite.binding.address_of_symbol(name)
        for name in ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
    )


@intrinsic
def run_workers(typingctx: Any, share: Any, workers: Any, arguments: Any) -> Any:
    """share(worker, *arguments) for each worker in range(workers), on up to as many threads; `arguments` is a tuple.

    One worker runs on the calling thread. `share` must not raise: an error has no way out of a parallel region.
    """
    kinds = share.get_call_type(typingctx, (types.int64, *arguments.types), {}).args
    compiled = share.dispatcher.overloads[kinds]
    openmp = has_openmp()

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        package = cgutils.alloca_once_value(builder, cgutils.make_anonymous_struct(builder, args[1:]))
        region = _region(context, builder.module, compiled, package.type, len(kinds) - 1, openmp)
        package = builder.bitcast(package, _POINTER)
        if not openmp:
            builder.call(region, [package])
            return context.get_dummy_value()
        kind = ir.FunctionType(ir.VoidType(), [_POINTER, _POINTER, _I32, _I32])
        parallel = cgutils.get_or_insert_function(builder.module, kind, "GOMP_parallel")
        with builder.if_else(builder.icmp_signed("==", args[1], _I64(1))) as (alone, together):
            with alone:
                builder.call(region, [package])
            with together:
                count = builder.trunc(args[1], _I32)
                builder.call(parallel, [builder.bitcast(region, _POINTER), package, count, _I32(0)])
        return context.get_dummy_value()

    return types.void(share, types.int64, arguments), codegen


def _region(context: Any, module: Any, compiled: Any, package: Any, count: int, openmp: bool) -> Any:
    """What every thread runs, package = {workers, arguments}: thread i of n does the workers i, i + n, ...

    n can be less than was asked for; outside of a parallel region it is 1.
    """
    name = module.get_unique_name(f"{compiled.fndesc.mangled_name}.region")
    region = ir.Function(module, ir.FunctionType(ir.VoidType(), [_POINTER]), name)
    region.linkage = "internal"
    body = ir.IRBuilder(region.append_basic_block("entry"))
    thread, threads = _I64(0), _I64(1)
    if openmp:
        query = ir.FunctionType(_I32, [])
        thread, threads = (
            body.sext(body.call(cgutils.get_or_insert_function(module, query, symbol), []), _I64)
            for symbol in ("omp_get_thread_num", "omp_get_num_threads")
        )
    values = body.load(body.bitcast(region.args[0], package))
    workers, arguments = body.extract_value(values, 0), body.extract_value(values, 1)
    function = context.declare_function(module, compiled.fndesc)
    context.active_code_library.add_linking_library(compiled.library)
    with cgutils.for_range_slice(body, thread, workers, threads, _I64) as (worker, _):
        unpacked = [worker, *(body.extract_value(arguments, i) for i in range(count))]
        context.call_conv.call_function(body, function, compiled.fndesc.restype, compiled.fndesc.argtypes, unpacked)
    body.ret_void()
    return region
