"""A program: compiles every Triton kernel for sm_90, as `triton_ops` launches it, without a GPU. Prints what it made.

Triton's interpreter knows no types of registers and no limits: what it runs need not compile. Here the launches are
caught, and their kernels go through Triton's compiler and ptxas. Run by test_triton_compiles, without TRITON_INTERPRET.
"""

import sys
from typing import Any
from unittest.mock import patch

import torch
import triton
from ops_cases import Heads, make_paged, make_pool, make_segments, normal
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton_cases import with_table

from loraplex.ops import LayerAttention, ModuleGroup, triton_ops

_NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
}
_DIVISIBLE = [["tt.divisibility", 16]]


def compile_launch(kernel: triton.JITFunction, args: tuple, constants: dict[str, Any]) -> Any:
    """The kernel as these arguments specialise it: pointers and integers that are multiples of 16, integers of 1."""
    signature, attributes, values = {}, {}, dict(constants)
    for index, (parameter, arg) in enumerate(zip(kernel.params, args, strict=False)):
        name = parameter.name
        if parameter.do_not_specialize and isinstance(arg, int):
            signature[name], is_divisible = "i32", False
        elif isinstance(arg, torch.Tensor):
            signature[name], is_divisible = f"*{_NAMES[arg.dtype]}", True
        elif isinstance(arg, float):
            signature[name], is_divisible = "fp32", False
        elif arg == 1:
            signature[name], values[name], is_divisible = "constexpr", 1, False
        else:
            signature[name], is_divisible = "i32", arg % 16 == 0
        if is_divisible:
            attributes[(index,)] = _DIVISIBLE
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, values, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32))


class Catcher:
    """Stands for launches. `made` by kernel name, every variant once."""

    def __init__(self) -> None:
        self.made: dict[str, list[Any]] = {}
        self._seen: set[str] = set()

    def launch(self, kernel: triton.JITFunction, grid: Any) -> Any:
        def call(*args: Any, **constants: Any) -> None:
            kinds = [
                arg.dtype if isinstance(arg, torch.Tensor) else (arg == 1, arg % 16 == 0)
                for arg, parameter in zip(args, kernel.params, strict=False)
                if isinstance(arg, torch.Tensor) or not parameter.do_not_specialize
            ]
            key = str((kernel.fn.__name__, kinds, constants))
            if key not in self._seen:
                self._seen.add(key)
                self.made.setdefault(kernel.fn.__name__, []).append(compile_launch(kernel, args, constants))

        return call


def launch_everything(dtype: torch.dtype) -> None:
    """A decode step and a prefill step of a model like Llama 8B: 32 query heads of 128, 8 of keys and values."""
    pool = with_table(make_pool([16, 16], 4096, 1024, dtype), is_aligned=True)
    for lengths in ([1, 0], [200, 100]):
        rows = sum(lengths)
        x, y = normal(rows, 4096, seed=1, dtype=dtype), normal(rows, 1024, seed=2, dtype=dtype)
        lora = make_segments([(0, lengths[0], 0, 1.0), (lengths[0], rows, 1, 1.0)], pool)
        triton_ops.add_lora(y, x, pool, lora)
        triton_ops.add_lora_group(torch.cat([y, y], dim=1), x, ModuleGroup([pool, pool]), lora)
    triton_ops.shrink(x, pool, lora)
    for chunks in ([(1000, 1), (30, 1)], [(0, 200)]):
        case = make_paged(chunks, Heads(32, 8, 128, 128), dtype)
        for layer in (LayerAttention(0.1), LayerAttention(0.1, 64, 30.0, torch.zeros(32))):
            triton_ops.paged_attention(*case.arguments, layer)
    triton_ops.store_kv(case.k_cache[0], case.v_cache[0], case.k_cache, case.v_cache, case.attn.slot_mapping[:16])
    x, weight = normal(3, 4096, seed=1, dtype=dtype), normal(4096, seed=2, dtype=dtype)
    triton_ops.rms_norm(x, weight, 1e-5, plus_one=False)
    triton_ops.silu_mul(x, x)
    triton_ops.draw(torch.zeros(2, 128256), [1, 2])


def main() -> None:
    catcher = Catcher()
    with patch.object(triton.JITFunction, "__getitem__", lambda kernel, grid: catcher.launch(kernel, grid)):
        for name in sys.argv[1:]:
            launch_everything(getattr(torch, name))
    for name, variants in catcher.made.items():
        shared = max(variant.metadata.shared for variant in variants)
        wide = sum(any(w in variant.asm["ptx"] for w in ("ld.global.v", "cp.async.cg")) for variant in variants)
        tensor = sum("mma" in variant.asm["ptx"] for variant in variants)
        sizes = [len(variant.asm["cubin"]) for variant in variants]
        what = f"{len(variants)} variants, cubin {sizes}, shared {shared}, mma {tensor}, wide {wide}"
        sys.stdout.write(f"{name}: {what}\n")


if __name__ == "__main__":
    main()
