"""Triton's shrink, expand and add_lora: against plain algebra, against the oracle, and in launches of any capacity."""

import pytest
import torch
from ops_cases import make_pool, make_segments, normal, strided
from test_ops_lora import POPULARITY, RANKS, assert_near, expected, runs
from torch import Tensor
from triton_cases import DEVICE, TRITON_DTYPES, on_device, with_table

from loraplex.ops import LoRASegments, ModuleGroup, ModulePool, torch_ops

triton_ops = pytest.importorskip("loraplex.ops.triton_ops", reason="Triton has no build for this platform")
DTYPE = pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
Span = tuple[int, int, int, float]


def check(dtype: torch.dtype, pool: ModulePool, spans: list[Span], rows: int) -> None:
    x, y = strided(rows, pool.in_features, dtype, seed=7), strided(rows, pool.out_features, dtype, seed=8)
    wanted = expected(y, x, pool, spans)
    lora = make_segments(spans, pool)
    there = _like(y)
    triton_ops.add_lora(there, _like(x), on_device(pool), on_device(lora))
    assert_near(there.cpu(), wanted, dtype, pool.in_features**0.5 * max(1, lora.max_rank) ** 0.5 * 20)
    assert there.as_strided((rows, 5), (there.stride(0), 1), y.shape[1]).isnan().all(), "wrote beyond a row"


def _like(view: Tensor) -> Tensor:
    """A copy on DEVICE with the row stride of `view`, the padding NaN."""
    whole = torch.full((len(view), view.stride(0)), float("nan"), dtype=view.dtype, device=DEVICE)
    whole[:, : view.shape[1]] = view
    return whole[:, : view.shape[1]]


@DTYPE
@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize("ranks", ["mixed", "absent"])
def test_add_lora_is_the_plain_algebra(dtype: torch.dtype, popularity: str, ranks: str) -> None:
    check(dtype, make_pool(RANKS[ranks], 48, 80, dtype), runs(POPULARITY[popularity]), rows=12)


@DTYPE
@pytest.mark.parametrize("length", [7, 16, 130])
def test_segments_longer_than_a_tile(dtype: torch.dtype, length: int) -> None:
    pool = make_pool(RANKS["mixed"], 96, 80, dtype)
    spans = [(0, length, 4, 1.0), (length, 2 * length, 1, 0.5), (2 * length, 2 * length + 1, 9, -1.0)]
    check(dtype, pool, spans, 2 * length + 3)


@DTYPE
@pytest.mark.parametrize("features", [(1, 1), (15, 17), (17, 63), (33, 129), (513, 40), (1300, 15)])
def test_every_feature_count(dtype: torch.dtype, features: tuple[int, int]) -> None:
    """Beyond 512 inputs shrink adds parts."""
    pool = make_pool([4, 3, 70], *features, dtype)
    check(dtype, pool, [(0, 3, 0, 1.0), (3, 10, 1, -0.5), (11, 16, 2, 2.0)], rows=17)


@DTYPE
def test_overlapping_segments_apply_in_order(dtype: torch.dtype) -> None:
    """A composition: several adapters on the same rows, rounded once a segment."""
    pool = make_pool([8, 4, 5], 32, 72, dtype)
    check(dtype, pool, [(0, 9, 0, 0.7), (0, 9, 1, 0.3), (5, 12, 2, 1.0), (0, 12, 1, -1.0), (3, 3, 0, 1.0)], 13)
    long = [(0, 80, 0, 0.7), (0, 80, 1, 0.3), (40, 100, 2, 1.0), (90, 130, 0, -1.0), (10, 130, 1, 0.5)]
    check(dtype, pool, long, 131)


@DTYPE
def test_rows_outside_segments_keep_their_bits(dtype: torch.dtype) -> None:
    """So do rows of an adapter without the module, and those of scale 0."""
    pool = make_pool([8, 0, 3], 32, 40, dtype)
    x, y = normal(14, 32, seed=1, dtype=dtype), normal(14, 40, seed=2, dtype=dtype).to(DEVICE)
    before = y.clone()
    lora = make_segments([(2, 4, 0, 1.0), (5, 9, 1, 1.0), (10, 12, 2, 0.0)], pool)
    triton_ops.add_lora(y, x.to(DEVICE), on_device(pool), on_device(lora))
    untouched = [0, 1, *range(4, 14)]
    assert torch.equal(y[untouched], before[untouched])
    assert not torch.equal(y[2:4], before[2:4])


@DTYPE
@pytest.mark.parametrize("features", [100, 700])
def test_shrink_and_expand_are_the_oracles(dtype: torch.dtype, features: int) -> None:
    """Each alone: embeddings call but the second half, dense products but one of them."""
    pool = make_pool([5, 8, 0, 70], features, 130, dtype)
    lora = make_segments([(0, 6, 1, 9.0), (2, 5, 0, 0.5), (6, 8, 2, 9.0), (7, 11, 3, 1.0)], pool)
    x = strided(11, features, dtype, seed=3)
    s = triton_ops.shrink(_like(x), on_device(pool), on_device(lora))
    wanted = torch_ops.shrink(x, pool, lora)
    assert s.dtype == torch.float32
    assert s.shape == wanted.shape
    for start, end, place in ((0, 6, 1), (6, 9, 0), (11, 15, 3)):
        rank = int(pool.rank[place])
        torch.testing.assert_close(s[start:end, :rank].cpu(), wanted[start:end, :rank], rtol=1e-4, atol=1e-4)
    wanted[:6, 8:] = float("nan")  # past the rank, where nothing may be read
    y = normal(11, 130, seed=5, dtype=dtype)
    there = y.to(DEVICE, copy=True)
    triton_ops.expand(there, wanted.to(DEVICE), on_device(pool), on_device(lora))
    torch_ops.expand(y, wanted.nan_to_num(), pool, lora)
    assert_near(there.cpu(), y, dtype, 300)


@DTYPE
def test_a_row_knows_nothing_of_its_neighbours(dtype: torch.dtype) -> None:
    """Bit-equal in tiles of one height, wherever the row stands, whatever the ranks of the others are."""
    pool = on_device(make_pool([7, 16, 3], 600, 48, dtype))
    x, y = normal(20, 600, seed=1, dtype=dtype).to(DEVICE), normal(20, 48, seed=2, dtype=dtype).to(DEVICE)
    together = y.clone()
    host = make_pool([7, 16, 3], 1, 1, dtype)
    triton_ops.add_lora(together, x, pool, on_device(make_segments([(0, 9, 0, 1.0), (9, 20, 1, 2.0)], host)))
    for row in (0, 5, 8):
        alone = y[row : row + 1].clone()
        lora = on_device(make_segments([(0, 1, 0, 1.0)], host))
        lora.max_rank = 16  # what RANKS follow: the widest of the batch
        triton_ops.add_lora(alone, x[row : row + 1].clone(), pool, lora)
        assert torch.equal(alone[0], together[row])


@DTYPE
def test_a_launch_of_some_capacity_serves_any_segments(dtype: torch.dtype) -> None:
    """As a captured graph is replayed: the same tensors and grid, other contents, the count on the device."""
    pool = make_pool([8, 4, 5, 0, 2], 40, 72, dtype)
    capacity, rows = 6, 24
    columns = {
        name: torch.full((capacity,), 2**20, dtype=torch.int32, device=DEVICE)
        for name in ("start", "end", "place", "offset")
    }
    scale, count = (
        torch.full((capacity,), float("nan"), device=DEVICE),
        torch.zeros(1, dtype=torch.int32, device=DEVICE),
    )
    x, y = normal(rows, 40, seed=1, dtype=dtype), normal(rows, 72, seed=2, dtype=dtype)
    there = on_device(pool)
    for spans in (
        [(0, 1, 0, 1.0)],
        [],
        [(0, 3, 1, 1.0), (3, 20, 0, 0.5), (20, 21, 3, 1.0), (21, 22, 2, 1.0), (22, 23, 4, 1.0), (23, 24, 0, 1.0)],
        [(0, 10, 2, 1.0), (0, 10, 1, -1.0), (12, 14, 0, 1.0)],
        [(0, 24, 4, 1.0)],
    ):
        live = make_segments(spans, pool)
        for name, column in columns.items():
            column.fill_(2**20)[: len(spans)] = getattr(live, name).to(DEVICE)
        scale[: len(spans)] = live.scale.to(DEVICE)
        count.fill_(len(spans))
        lora = LoRASegments(**columns, scale=scale, num_rows=rows, max_rank=8, count=count)
        found = y.to(DEVICE, copy=True)
        triton_ops.add_lora(found, x.to(DEVICE), there, lora)
        assert_near(found.cpu(), expected(y, x, pool, spans), dtype, 300)


@DTYPE
def test_a_group_is_its_modules_side_by_side(dtype: torch.dtype) -> None:
    """q, k and v of different widths and ranks in two launches: bit by bit what each alone gives."""
    pools = [
        with_table(on_device(make_pool(ranks, 560, width, dtype, seed)))
        for ranks, width, seed in (([8, 3, 0], 96, 1), ([8, 0, 2], 24, 50), ([4, 16, 2], 24, 90))
    ]
    spans = [(0, 3, 0, 1.0), (3, 7, 1, 0.5), (3, 7, 2, 2.0)]
    lora = on_device(make_segments(spans, make_pool([16] * 3, 1, 1, dtype)))
    x, y = normal(9, 560, seed=1, dtype=dtype).to(DEVICE), normal(9, 150, seed=2, dtype=dtype).to(DEVICE)
    together, each = y.clone(), y.clone()
    triton_ops.add_lora_group(together[:, :144], x, ModuleGroup(pools), lora)
    for part, pool in zip(each[:, :144].split([96, 24, 24], dim=1), pools, strict=True):
        triton_ops.add_lora(part, x, pool, lora)
    assert torch.equal(together, each)
    assert not torch.equal(each[:7], y[:7])


def test_what_no_kernel_takes_goes_the_oracles_way() -> None:
    pool = make_pool([4], 24, 16, torch.float64)
    x, y = torch.randn(3, 24, dtype=torch.float64), torch.zeros(3, 16, dtype=torch.float64)
    lora = make_segments([(0, 3, 0, 1.0)], pool)
    wanted = y.clone()
    torch_ops.add_lora(wanted, x, pool, lora)
    triton_ops.add_lora(y, x, pool, lora)
    assert torch.equal(y, wanted)
