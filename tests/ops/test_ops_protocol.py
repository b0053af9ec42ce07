"""What holds for the implementations as modules: the protocol, their imports, their warm-up."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ops_cases import DTYPES, Heads, make_paged, make_pool, make_segments, normal

from loraplex.ops import LayerAttention, Ops, numba_attention, numba_lora, numba_ops, select_ops, torch_ops

SERVER = Path(inspect.getfile(Ops)).parents[2]
HEAVY = ["fastapi", "pydantic", "sqlalchemy"]
VERBS = ["store_kv", "paged_attention", "shrink", "expand", "add_lora", "draw"]


@pytest.mark.parametrize("ops", [torch_ops, numba_ops], ids=["torch", "numba"])
@pytest.mark.parametrize("verb", VERBS)
def test_signatures_are_the_protocols(ops, verb: str) -> None:
    wanted = list(inspect.signature(getattr(Ops, verb)).parameters)[1:]
    assert list(inspect.signature(getattr(ops, verb)).parameters) == wanted


def test_a_cpu_gets_numba_and_any_other_device_torch() -> None:
    assert select_ops("cpu") is numba_ops
    assert select_ops("meta") is torch_ops


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("torch_ops", ["numba", "fastapi", "pydantic", "sqlalchemy"]),
        ("numba_ops", ["fastapi", "pydantic", "sqlalchemy"]),
    ],
)
def test_imports_stay_light(module: str, unwanted: list[str]) -> None:
    program = f"import sys, loraplex.ops.{module}; print([name for name in {unwanted} if name in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(SERVER)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_after_warm_up_nothing_compiles(dtype: torch.dtype) -> None:
    numba_ops.warm_up(dtype)
    kernels = [
        value
        for module in (numba_lora, numba_attention)
        for name, value in vars(module).items()
        if hasattr(value, "signatures") and not name.startswith("_")
    ]
    before = {kernel: list(kernel.signatures) for kernel in kernels}
    assert any(before.values())
    pool = make_pool([8, 3], 40, 50, dtype)
    x, y, lora = normal(6, 40, seed=1, dtype=dtype), normal(6, 50, seed=2, dtype=dtype), make_segments([], pool)
    for spans in ([], [(0, 4, 0, 1.0), (4, 6, 1, 2.0)]):
        lora = make_segments(spans, pool)
        numba_ops.add_lora(y, x, pool, lora)
        numba_ops.expand(y, numba_ops.shrink(x, pool, lora), pool, lora)
    heads = Heads(4, 2, 32, 16)
    case = make_paged([(0, 5), (40, 1)], heads, dtype)
    numba_ops.store_kv(
        normal(6, 2, 32, seed=1, dtype=dtype),
        normal(6, 2, 16, seed=2, dtype=dtype),
        case.k_cache,
        case.v_cache,
        case.attn.slot_mapping,
    )
    for layer in (LayerAttention(1.0), LayerAttention(0.5, 3, 2.0, torch.zeros(4))):
        numba_ops.paged_attention(*case.arguments, layer)
    assert {kernel: list(kernel.signatures) for kernel in kernels} == before


def test_warm_up_of_a_dtype_without_kernels_does_nothing() -> None:
    numba_ops.warm_up(torch.float16)


def test_kernels_run_where_no_cache_can_be_written() -> None:
    """numba refuses `cache=True` when neither the package nor the user's cache directory is writable."""
    program = (
        "import numba.core.caching as c; c.CacheImpl._locator_classes.clear()\n"
        "from loraplex.ops.numba_types import jit, read_int64\n"
        "k = jit(lambda a: read_int64(a, 0))\n"
        "import torch; t = torch.tensor([41]); print(k(t.data_ptr()))"
    )
    environment = {**os.environ, "PYTHONPATH": str(SERVER)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "41"
