"""The batches of `ops_cases` where Triton's kernels run: on a GPU, else on the CPU under Triton's interpreter.

The interpreter multiplies bfloat16 wrongly (Triton 3.9 takes its bits for integers), so bfloat16 is tested on a GPU.
"""

import dataclasses
from typing import TypeVar

import pytest
import torch
from ops_cases import Paged
from torch import Tensor

from loraplex.ops import ModulePool, module_table

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a GPU: Triton's interpreter has no right bfloat16")
TRITON_DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=needs_gpu)]

Values = TypeVar("Values")


def on_device(values: Values) -> Values:
    """A copy of a dataclass of tensors, those on DEVICE; the slabs of a pool, too, and their addresses."""
    parts = {
        field.name: part.to(DEVICE) if isinstance(part := getattr(values, field.name), Tensor) else part
        for field in dataclasses.fields(values)  # type: ignore[arg-type]
        if field.init
    }
    if isinstance(values, ModulePool):
        parts["slabs"] = [None if slab is None else slab.to(DEVICE) for slab in values.slabs]
        address = [0 if slab is None else slab.data_ptr() for slab in parts["slabs"]]
        parts["address"] = torch.tensor(address, dtype=torch.int64, device=DEVICE)
    if isinstance(values, Paged):
        parts["attn"] = on_device(values.attn)
    return type(values)(**parts)


def with_table(pool: ModulePool, is_aligned: bool = False) -> ModulePool:
    """The same pool, with its table where its other tensors are."""
    parts = (pool.address, pool.rank, pool.offset_a, pool.offset_b, pool.scaling)
    slab = next(slab for slab in pool.slabs if slab is not None)
    return dataclasses.replace(pool, table=module_table(*parts, slab.element_size()), is_aligned=is_aligned)
