"""shrink, expand and add_lora: both implementations against plain algebra, and against each other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import DTYPES, make_pool, make_segments, matrices, normal, strided
from torch import Tensor

from loraplex.ops import LoRASegments, ModulePool, numba_ops, torch_ops

IMPLEMENTATIONS = pytest.mark.parametrize("ops", [torch_ops, numba_ops], ids=["torch", "numba"])
ALL_DTYPES = pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)

POPULARITY = {
    "identical": [1] * 12,
    "distinct": list(range(1, 13)),
    "uniform": [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4],
    "skewed": [1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 3, 4],
    "base-only": [],
    "some base": [1, 1, 0, 0, 0, 2, 3, 3, 3, 3, 3, 0],
}
RANKS = {
    "1": [1] * 13,
    "3": [3] * 13,
    "4": [4] * 13,
    "8": [8] * 13,
    "16": [16] * 13,
    "64": [64] * 13,
    "mixed": [5, 1, 3, 16, 64, 8, 4, 2, 7, 33, 16, 8, 1],
    "absent": [0, 4, 0, 8, 0, 3, 0, 1, 0, 16, 0, 2, 0],
}


def runs(places: list[int]) -> list[tuple[int, int, int, float]]:
    """One segment for each run of equal places; place 0 stands for the base: no segment."""
    spans: list[tuple[int, int, int, float]] = []
    for row, place in enumerate(places):
        if spans and spans[-1][1] == row and spans[-1][2] == place:
            spans[-1] = (spans[-1][0], row + 1, place, spans[-1][3])
        elif place:
            spans.append((row, row + 1, place, 1.0 + 0.5 * place))
    return spans


def expected(y: Tensor, x: Tensor, pool: ModulePool, spans: list[tuple[int, int, int, float]]) -> Tensor:
    """y + Σ scale · scaling · x Aᵀ Bᵀ in float64, rounded to y's dtype after each segment."""
    y = y.clone()
    for start, end, place, scale in spans:
        a, b = matrices(pool, place)
        delta = scale * pool.scaling[place].double() * (x[start:end].double() @ a.T @ b.T)
        y[start:end] = (y[start:end].double() + delta).to(y.dtype)
    return y


def assert_near(actual: Tensor, wanted: Tensor, dtype: torch.dtype, size: float) -> None:
    """Equal but for float32 sums of magnitude `size` in another order, and one rounding to `dtype` either way."""
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(actual.double(), wanted.double(), rtol=1e-5 + rounding, atol=2e-6 * size)


def check(ops, dtype: torch.dtype, pool: ModulePool, spans: list[tuple[int, int, int, float]], rows: int) -> None:
    x = strided(rows, pool.in_features, dtype, seed=7)
    y = strided(rows, pool.out_features, dtype, seed=8)
    wanted = expected(y, x, pool, spans)
    lora = make_segments(spans, pool)
    ops.add_lora(y, x, pool, lora)
    size = pool.in_features**0.5 * max(1, lora.max_rank) ** 0.5 * 20
    assert_near(y, wanted, dtype, size)
    padding = y.as_strided((rows, 5), (y.stride(0), 1), y.shape[1])
    assert padding.isnan().all(), "wrote beyond a row"


@IMPLEMENTATIONS
@ALL_DTYPES
@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize("ranks", RANKS)
def test_add_lora_is_the_plain_algebra(ops, dtype: torch.dtype, popularity: str, ranks: str) -> None:
    pool = make_pool(RANKS[ranks], 48, 80, dtype)
    check(ops, dtype, pool, runs(POPULARITY[popularity]), rows=12)


SEGMENTS = {
    "identical": [1, 1, 1, 1],
    "distinct": [1, 2, 3, 4],
    "uniform": [1, 2, 1, 2],
    "skewed": [1, 1, 1, 2],
    "base-only": [],
}


@IMPLEMENTATIONS
@ALL_DTYPES
@pytest.mark.parametrize("popularity", SEGMENTS)
@pytest.mark.parametrize("length", [1, 7, 16, 257])
@pytest.mark.parametrize("ranks", ["1", "8", "16", "64", "mixed"])
def test_segments_of_every_length(ops, dtype: torch.dtype, popularity: str, length: int, ranks: str) -> None:
    """Against the algebra, and against each segment alone: bit-equal where the kernels promise it."""
    pool = make_pool(RANKS[ranks], 96, 80, dtype)
    spans = [(i * length, (i + 1) * length, place, 1.0 + 0.25 * place) for i, place in enumerate(SEGMENTS[popularity])]
    rows = 4 * length + 3
    check(ops, dtype, pool, spans, rows)
    x, y = normal(rows, 96, seed=3, dtype=dtype), normal(rows, 80, seed=4, dtype=dtype)
    together = y.clone()
    ops.add_lora(together, x, pool, make_segments(spans, pool))
    for start, end, place, scale in spans:
        alone = y[start:end].clone()
        ops.add_lora(alone, x[start:end].clone(), pool, make_segments([(0, length, place, scale)], pool))
        if ops is numba_ops and dtype in DTYPES:
            assert torch.equal(alone, together[start:end])
        else:
            assert_near(alone, together[start:end], dtype, 96**0.5 * 64**0.5 * 20)
    last = spans[-1][1] if spans else 0
    assert torch.equal(together[last:], y[last:]), "rows of the base"


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", [(1, 1), (15, 17), (16, 64), (17, 63), (31, 65), (33, 128), (64, 129), (100, 15)])
def test_every_feature_count(ops, dtype: torch.dtype, features: tuple[int, int]) -> None:
    pool = make_pool([4, 3, 9], *features, dtype)
    check(ops, dtype, pool, [(0, 3, 0, 1.0), (3, 10, 1, -0.5), (11, 16, 2, 2.0)], rows=17)


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_overlapping_segments_apply_in_order(ops, dtype: torch.dtype) -> None:
    """A composition: several adapters on the same rows, rounded once a segment."""
    pool = make_pool([8, 4, 5], 32, 72, dtype)
    check(ops, dtype, pool, [(0, 9, 0, 0.7), (0, 9, 1, 0.3), (5, 12, 2, 1.0), (0, 12, 1, -1.0), (3, 3, 0, 1.0)], 13)


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_outside_segments_keep_their_bits(ops, dtype: torch.dtype) -> None:
    pool = make_pool([8, 0], 32, 40, dtype)
    x, y = normal(10, 32, seed=1, dtype=dtype), normal(10, 40, seed=2, dtype=dtype)
    before = y.clone()
    ops.add_lora(y, x, pool, make_segments([(2, 4, 0, 1.0), (5, 9, 1, 1.0)], pool))
    untouched = [0, 1, *range(4, 10)]
    assert torch.equal(y[untouched], before[untouched])
    assert not torch.equal(y[2:4], before[2:4])


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shrink_is_x_times_a_in_float32(ops, dtype: torch.dtype) -> None:
    pool = make_pool([5, 8, 0, 1], 100, 16, dtype)
    x = strided(11, 100, dtype, seed=3)
    spans = [(0, 6, 1, 9.0), (2, 5, 0, 9.0), (6, 8, 2, 9.0), (7, 11, 3, 9.0)]
    lora = make_segments(spans, pool)
    s = ops.shrink(x, pool, lora)
    assert s.dtype == torch.float32
    assert s.shape == (15, 8)
    for (start, end, place, _), offset in zip(spans, lora.offset.tolist(), strict=True):
        a, _ = matrices(pool, place)
        wanted = x[start:end].double() @ a.T
        torch.testing.assert_close(s[offset : offset + end - start, : len(a)].double(), wanted, rtol=1e-5, atol=2e-5)


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expand_reads_no_column_past_the_rank(ops, dtype: torch.dtype) -> None:
    pool = make_pool([3, 6], 16, 70, dtype)
    lora = make_segments([(0, 5, 0, 1.0), (5, 6, 1, 1.0)], pool)
    s = normal(6, 6, seed=4)
    s[:5, 3:] = float("nan")
    y = torch.zeros(6, 70, dtype=dtype)
    ops.expand(y, s, pool, lora)
    assert y.isfinite().all()
    _, b = matrices(pool, 0)
    assert_near(y[:5], (0.5 * s[:5, :3].double() @ b.T).to(dtype), dtype, 10)


@IMPLEMENTATIONS
def test_bfloat16_is_rounded_to_nearest_even_once(ops) -> None:
    """A delta of 1 ulp / 2 goes to the even neighbour, of a little more or less to the nearer one."""
    pool = make_pool([1], 1, 4, torch.bfloat16)
    slab = pool.slabs[0]
    assert slab is not None
    slab[3] = 1.0
    slab[7:11] = torch.tensor([2**-8, 2**-8, 2**-8 + 2**-15, 2**-8 - 2**-15])  # ulp of 1 is 2^-7
    pool.scaling.fill_(1.0)
    y = torch.tensor([[1.0, 1.0 + 2**-7, 1.0, 1.0 + 2**-7]], dtype=torch.bfloat16)
    ops.add_lora(y, torch.ones(1, 1, dtype=torch.bfloat16), pool, make_segments([(0, 1, 0, 1.0)], pool))
    assert y.tolist() == [[1.0, 1.0 + 2**-6, 1.0 + 2**-7, 1.0 + 2**-7]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_that_are_none_are_passed_on(dtype: torch.dtype) -> None:
    pool = make_pool([4], 20, 33, dtype)
    x, y = normal(3, 20, seed=1, dtype=dtype), normal(3, 33, seed=2, dtype=dtype)
    x[1, 19] = float("nan")
    y[2, 32] = float("inf")
    numba_ops.add_lora(y, x, pool, make_segments([(0, 3, 0, 1.0)], pool))
    assert y[0].isfinite().all()
    assert y[1].isnan().all()
    assert y[2, 32] == float("inf")
    assert y[2, :32].isfinite().all()


@st.composite
def batches(draw: st.DrawFn) -> tuple[ModulePool, LoRASegments, Tensor, Tensor]:
    dtype = draw(st.sampled_from(DTYPES))
    ranks = draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 8, 11, 16]), min_size=1, max_size=5))
    pool = make_pool(ranks, draw(st.integers(1, 70)), draw(st.integers(1, 200)), dtype)
    rows = draw(st.integers(1, 20))
    spans = []
    for _ in range(draw(st.integers(0, 6))):
        start = draw(st.integers(0, rows))
        spans.append((start, draw(st.integers(start, rows)), draw(st.integers(0, len(ranks) - 1)), 0.5))
    pad = draw(st.integers(0, 3))
    x, y = strided(rows, pool.in_features, dtype, 1, pad), strided(rows, pool.out_features, dtype, 2, pad)
    return pool, make_segments(spans, pool), x, y


@settings(max_examples=150)
@given(batches())
def test_numba_equals_torch_on_any_batch(batch: tuple[ModulePool, LoRASegments, Tensor, Tensor]) -> None:
    pool, lora, x, y = batch
    other = y.clone()
    torch_ops.add_lora(other, x, pool, lora)
    numba_ops.add_lora(y, x, pool, lora)
    assert_near(y, other, y.dtype, 200)
