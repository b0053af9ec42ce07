"""What holds for Triton's operations as a module: the protocol, its imports, no waiting, compiled code, draws."""

import ast
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ops_cases import Heads, make_paged, make_pool, make_segments, normal
from test_ops_draw import keys
from triton_cases import DEVICE, HAS_GPU, TRITON_DTYPES, on_device, with_table

from loraplex.ops import LayerAttention, Ops, select_ops
from loraplex.ops.noise import gumbel_noise

triton_ops = pytest.importorskip("loraplex.ops.triton_ops", reason="Triton has no build for this platform")
HERE, SERVER = Path(__file__).parent, Path(inspect.getfile(Ops)).parents[2]
WAITING = {"item", "tolist", "cpu", "numpy", "nonzero", "synchronize", "is_nonzero", "unique", "__bool__"}


@pytest.mark.parametrize("verb", ["store_kv", "paged_attention", "shrink", "expand", "add_lora", "draw"])
def test_signatures_are_the_protocols(verb: str) -> None:
    wanted = list(inspect.signature(getattr(Ops, verb)).parameters)[1:]
    assert list(inspect.signature(getattr(triton_ops, verb)).parameters) == wanted


def test_cuda_gets_triton() -> None:
    assert select_ops("cuda") is triton_ops


def program(code: str, **environment: str) -> str:
    """What a new interpreter prints, which compiles kernels instead of interpreting them."""
    path = f"{SERVER}{os.pathsep}{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    given = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    given |= {"PYTHONPATH": path, "TRITON_DEFAULT_FP_FUSION": "1", **environment}
    done = subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_imports_stay_light() -> None:
    unwanted = ["numba", "fastapi", "pydantic", "sqlalchemy", "transformers"]
    code = f"import sys, loraplex.ops.triton_ops; print([name for name in {unwanted} if name in sys.modules])"
    assert program(code).strip() == "[]"


def test_a_cpu_never_imports_triton() -> None:
    code = "import sys, loraplex.ops as o; o.select_ops('cpu'); print('triton' in sys.modules)"
    assert program(code).strip() == "False"


def test_every_kernel_compiles_for_hopper(tmp_path: Path) -> None:
    """In bfloat16, which the interpreter cannot run; with tensor cores and loads of 16 bytes where they belong."""
    code = "import sys, triton_compile; sys.argv[1:] = ['bfloat16']; triton_compile.main()"
    made = dict(line.split(": ", 1) for line in program(code, TRITON_CACHE_DIR=str(tmp_path)).splitlines())
    assert len(made) == 12
    for name in ("shrink_kernel", "expand_kernel", "prefill_kernel", "decode_kernel"):
        assert made[name].endswith("mma 4, wide 4"), made[name]


@pytest.mark.parametrize(
    "module", ["triton_ops", "triton_lora", "triton_attention", "triton_sampling", "triton_pointwise"]
)
def test_no_code_waits_for_the_device(module: str) -> None:
    """By what it calls: nothing that hands a tensor's value to the host, and no index that is a tensor of truths."""
    source = (SERVER / "loraplex" / "ops" / f"{module}.py").read_text(encoding="utf-8")
    called = {
        node.func.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    }
    assert not called & WAITING


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU: only CUDA tells of a wait")
def test_no_op_waits_for_the_device() -> None:
    pool = with_table(on_device(make_pool([8, 4], 1024, 64, torch.bfloat16)))
    lora = make_segments([(0, 3, 0, 1.0), (3, 4, 1, 1.0)], pool)
    lora = on_device(lora)
    x, y = (torch.randn(4, size, device=DEVICE).bfloat16() for size in (1024, 64))
    case = on_device(make_paged([(20, 3), (300, 1)], Heads(4, 2, 64, 64), torch.bfloat16))
    logits = torch.randn(4, 1000, device=DEVICE)

    def everything() -> None:
        triton_ops.add_lora(y, x, pool, lora)
        triton_ops.expand(y, triton_ops.shrink(x, pool, lora), pool, lora)
        triton_ops.paged_attention(*case.arguments, LayerAttention(0.1))
        triton_ops.store_kv(case.k_cache[0], case.v_cache[0], case.k_cache, case.v_cache, case.attn.slot_mapping[:16])
        triton_ops.draw(logits, keys(4))

    everything()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("vocabulary", [1, 17, 1000, 20_000])
def test_the_kernel_draws_what_the_formula_says(vocabulary: int) -> None:
    """Up to rounding: where they differ, the two candidates are equal to the last bits."""
    logits = normal(6, vocabulary, seed=vocabulary).to(DEVICE) * 2
    got = triton_ops.draw(logits, keys(6))
    noisy = logits + gumbel_noise(keys(6), torch.arange(vocabulary, device=DEVICE))
    chosen = noisy.gather(1, got.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(chosen, noisy.amax(-1), rtol=1e-5, atol=1e-5)


def test_a_row_knows_nothing_of_its_batch() -> None:
    logits = normal(5, 9000, seed=1).to(DEVICE)
    whole = triton_ops.draw(logits, keys(5))
    for row in (0, 4):
        assert int(triton_ops.draw(logits[row : row + 1], [keys(5)[row]])) == int(whole[row])
    assert torch.equal(triton_ops.draw(torch.cat([logits, logits], dim=1)[:, :9000], keys(5)), whole), "a row stride"


def test_what_is_masked_is_never_drawn() -> None:
    logits = torch.full((40, 300), -torch.inf, device=DEVICE)
    logits[:, 7], logits[:, 299] = 0.0, -1.0
    assert set(triton_ops.draw(logits, keys(40)).tolist()) == {7, 299}


def test_a_row_of_no_numbers_gives_some_token() -> None:
    drawn = triton_ops.draw(torch.full((2, 50), float("nan"), device=DEVICE), keys(2))
    assert ((drawn >= 0) & (drawn < 50)).all()


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("plus_one", [False, True])
def test_rms_norm_is_transformers(dtype: torch.dtype, plus_one: bool) -> None:
    """The roundings, too: before the weight, or after it."""
    x, weight = normal(2, 3, 77, seed=1, dtype=dtype).to(DEVICE) * 3, normal(77, seed=2, dtype=dtype).to(DEVICE)
    norm = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
    wanted = (norm * (1.0 + weight.float())).to(dtype) if plus_one else weight * norm.to(dtype)
    rounding = {"rtol": max(1e-6, torch.finfo(dtype).eps), "atol": 1e-6}
    torch.testing.assert_close(triton_ops.rms_norm(x, weight, 1e-6, plus_one=plus_one), wanted, **rounding)
    wide = torch.cat([x, x], dim=2)[..., :77]
    assert torch.equal(
        triton_ops.rms_norm(wide, weight, 1e-6, plus_one=plus_one),
        triton_ops.rms_norm(x, weight, 1e-6, plus_one=plus_one),
    )


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
def test_silu_mul_is_torchs(dtype: torch.dtype) -> None:
    """Of two parts of one product, as a group's outputs are."""
    gate, up = (normal(1, 4, 2 * 1100, seed=3, dtype=dtype).to(DEVICE) * 3).split(1100, dim=2)
    rounding = {"rtol": max(1e-6, 2 * torch.finfo(dtype).eps), "atol": 1e-6}
    torch.testing.assert_close(triton_ops.silu_mul(gate, up), torch.nn.functional.silu(gate) * up, **rounding)
