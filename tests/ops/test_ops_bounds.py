"""The kernels read no byte past the end of what they are given: everything ends where a forbidden page begins."""

import ctypes
import inspect
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ops_cases import DTYPES, Heads, make_paged, make_pool, make_segments, normal

from loraplex.ops import LayerAttention, Ops, numba_ops

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect of libc")


def at_the_edge(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of `tensor` whose last byte is the last one of a page, with no access to the next page."""
    size = tensor.numel() * tensor.element_size()
    length = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, length + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + length), mmap.PAGESIZE, 0) == 0
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=length - size).view(tensor.shape)
    return copy.copy_(tensor)


def run_at_the_edge(dtype: torch.dtype) -> None:
    """Every kernel, with sizes that are no multiple of a tile; a read too far is a segmentation fault."""
    for features, out_features, rank in ((17, 70, 3), (16, 64, 4), (1, 1, 1), (47, 129, 6)):
        pool = make_pool([rank], features, out_features, dtype)
        a_and_bt = pool.slabs[0]
        assert a_and_bt is not None
        slab = at_the_edge(a_and_bt[:-3])  # without the gap after Bt
        pool.address[0] = slab.data_ptr()
        x = at_the_edge(normal(5, features, seed=1, dtype=dtype))
        y = at_the_edge(normal(5, out_features, seed=2, dtype=dtype))
        numba_ops.add_lora(y, x, pool, make_segments([(0, 5, 0, 1.0)], pool))
        a = at_the_edge(a_and_bt[3 : 3 + rank * features])
        pool.address[0] = a.data_ptr()
        pool.offset_a[0] = 0
        numba_ops.shrink(x, pool, make_segments([(0, 5, 0, 1.0)], pool))
    for heads in (Heads(3, 1, 17, 65), Heads(2, 2, 64, 48), Heads(1, 1, 1, 1)):
        case = make_paged([(60, 9)], heads, dtype, block_size=69)
        k_cache, v_cache = (at_the_edge(cache[case.attn.block_tables[0, :1].long()]) for cache in case.arguments[1:3])
        case.attn.block_tables = at_the_edge(torch.zeros(1, 1, dtype=torch.int32))
        numba_ops.paged_attention(at_the_edge(case.q), k_cache, v_cache, case.attn, LayerAttention(1.0))
        k, v = (at_the_edge(cache[0, 60:]) for cache in (k_cache, v_cache))
        numba_ops.store_kv(k, v, k_cache, v_cache, torch.arange(60, 69))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_read_past_its_end(dtype: torch.dtype) -> None:
    here, server = Path(__file__).parent, Path(inspect.getfile(Ops)).parents[2]
    program = f"import torch, test_ops_bounds; test_ops_bounds.run_at_the_edge({dtype})"
    environment = {**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{server}"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr or f"killed by signal {-done.returncode}"
