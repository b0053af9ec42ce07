"""Dense products through the LoRA kernels: the same bits for a row whatever rows stand beside it.

torch's own products choose their kernel by the number of rows (at 512 inputs float32 and bfloat16 both differ), packed
ones need a second copy of the weight. A shrink whose rank is the number of outputs is a product, too, and so is an
expand whose rank is the number of inputs: for a weight that is used for few rows (a step's rows of one expert, of one
router, of one adapter's own head) they read it where it lies, at the memory's speed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from loraplex.ops import LoRASegments, ModulePool, Ops, module_table


def multiply(ops: Ops, x: Tensor, weight: Tensor) -> Tensor:
    """x [n, in] · weightᵀ [in, out] -> float32 [n, out] for a weight [out, in] of x's dtype."""
    return StackedProduct(ops, weight.unsqueeze(0)).in_float32(x, [(0, 0, len(x))])


class StackedProduct:
    """The products of a stack of weights [E, out, in], or transposed [E, in, out], each over its own rows."""

    def __init__(self, ops: Ops, weight: Tensor, transposed: bool = False):
        count, first, second = weight.shape
        self.out_features, self.in_features = (second, first) if transposed else (first, second)
        self._ops = ops
        self._transposed = transposed
        slab = weight.reshape(-1)  # a view, and a copy only of what is not contiguous
        self._rank = first
        offset = torch.arange(count, dtype=torch.int64, device=weight.device) * (first * second)
        self._pool = ModulePool(
            self.in_features,
            self.out_features,
            [slab] * count,
            torch.full_like(offset, slab.data_ptr()),
            torch.full_like(offset, self._rank, dtype=torch.int32),
            offset,
            offset,
            torch.ones_like(offset, dtype=torch.float32),
        )
        if weight.device.type != "cpu":
            pool = self._pool
            parts = (pool.address, pool.rank, pool.offset_a, pool.offset_b, pool.scaling)
            pool.table = module_table(*parts, weight.element_size())
            pool.is_aligned = slab.data_ptr() % 16 == 0 and first * second * weight.element_size() % 16 == 0

    def __call__(self, x: Tensor, runs: Sequence[tuple[int, int, int]]) -> Tensor:
        """x [S, in] -> [S, out] in x's dtype; rows start:end by the weight e for each of `runs` (e, start, end), which
        cover all rows."""
        if not self._transposed:
            return self.in_float32(x, runs).to(x.dtype)
        y = x.new_zeros(len(x), self.out_features)
        self._ops.expand(y, x.float(), self._pool, self._segments(runs, len(x)))
        return y

    def in_float32(self, x: Tensor, runs: Sequence[tuple[int, int, int]]) -> Tensor:
        """The same, not rounded; of a stack that is not transposed."""
        assert not self._transposed
        return self._ops.shrink(x, self._pool, self._segments(runs, len(x)))

    def _segments(self, runs: Sequence[tuple[int, int, int]], num_rows: int) -> LoRASegments:
        place, start, end = (
            torch.tensor(runs, dtype=torch.int32, device=self._pool.rank.device).reshape(-1, 3).T.contiguous()
        )
        return LoRASegments(start, end, place, torch.ones_like(start, dtype=torch.float32), start, num_rows, self._rank)


class RowInvariantLinear(TorchFunctionMode):
    """A `with` block in which `torch.nn.functional.linear` is `multiply`: for small modules of the base that call it
    themselves (routers)."""

    def __init__(self, ops: Ops):
        super().__init__()
        self._ops = ops

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is nn.functional.linear and not kwargs and len(args) in (2, 3):
            x, weight = args[:2]
            bias = args[2] if len(args) == 3 else None
            if x.dtype == weight.dtype and weight.ndim == 2:
                y = multiply(self._ops, x.reshape(-1, x.shape[-1]), weight)
                y = (y if bias is None else y + bias.float()).to(x.dtype)
                return y.view(*x.shape[:-1], weight.shape[0])
        return func(*args, **(kwargs or {}))
