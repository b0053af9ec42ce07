"""Row invariance: what a kernel gives for a token is bit-equal whatever else is in the batch, wherever the token
stands, however its sequence was cut, on however many threads."""

import sys

import pytest
import torch
from ops_cases import DTYPES, Heads, Paged, make_paged, make_pool, make_segments, normal
from torch import Tensor

from loraplex.ops import LayerAttention, ModulePool, numba_ops, numba_threads

LENGTHS = range(1, 258)
PARTS = pytest.mark.parametrize("dtype", DTYPES, ids=str)
HEADS = Heads(6, 2, 64, 48)
LAYERS = {
    "plain": LayerAttention(0.2),
    "window": LayerAttention(0.2, window=50),
    "all": LayerAttention(0.2, window=100, softcap=4.0, sinks=torch.linspace(-1, 2, 6)),
}


def add_lora(y: Tensor, x: Tensor, pool: ModulePool, spans: list[tuple[int, int, int, float]]) -> Tensor:
    y = y.clone()
    numba_ops.add_lora(y, x, pool, make_segments(spans, pool))
    return y


@PARTS
@pytest.mark.parametrize("shape", [(64, 128, 8), (75, 90, 5)], ids=str)
def test_lora_for_every_number_of_rows(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    in_features, out_features, rank = shape
    pool = make_pool([rank], in_features, out_features, dtype)
    x, y = normal(257, in_features, seed=1, dtype=dtype), normal(257, out_features, seed=2, dtype=dtype)
    together = add_lora(y, x, pool, [(0, 257, 0, 0.7)])
    assert not torch.equal(together, y)
    for rows in LENGTHS:
        assert torch.equal(add_lora(y[:rows], x[:rows], pool, [(0, rows, 0, 0.7)]), together[:rows]), rows
        start = 257 - rows
        assert torch.equal(add_lora(y, x, pool, [(start, 257, 0, 0.7)])[start:], together[start:]), rows


@PARTS
def test_shrink_for_every_number_of_rows(dtype: torch.dtype) -> None:
    pool = make_pool([7], 75, 16, dtype)
    x = normal(257, 75, seed=1, dtype=dtype)
    together = numba_ops.shrink(x, pool, make_segments([(0, 257, 0, 1.0)], pool))
    for rows in LENGTHS:
        part = numba_ops.shrink(x, pool, make_segments([(257 - rows, 257, 0, 1.0)], pool))
        assert torch.equal(part, together[257 - rows :]), rows


@PARTS
def test_lora_wherever_a_row_stands_among_other_adapters(dtype: torch.dtype) -> None:
    """Rows of adapter 1 alone, one by one; then scattered among segments of others, wider and narrower."""
    pool = make_pool([16, 5, 64, 0, 3], 80, 144, dtype)
    x, y = normal(40, 80, seed=1, dtype=dtype), normal(40, 144, seed=2, dtype=dtype)
    alone = torch.cat([add_lora(y[t : t + 1], x[t : t + 1], pool, [(0, 1, 1, 1.5)]) for t in range(40)])
    for cut in range(1, 39):
        spans = [(0, cut, 1, 1.5), (cut, cut + 1, cut % 5, 0.5), (cut + 1, 40, 1, 1.5)]
        together = add_lora(y, x, pool, spans)
        assert torch.equal(together[:cut], alone[:cut])
        assert torch.equal(together[cut + 1 :], alone[cut + 1 :])


@PARTS
def test_compositions_do_not_depend_on_their_neighbours(dtype: torch.dtype) -> None:
    pool = make_pool([16, 5, 4], 80, 144, dtype)
    x, y = normal(9, 80, seed=1, dtype=dtype), normal(9, 144, seed=2, dtype=dtype)
    alone = add_lora(y[4:7], x[4:7], pool, [(0, 3, 0, 0.3), (0, 3, 1, 0.7)])
    together = add_lora(y, x, pool, [(0, 4, 2, 1.0), (4, 7, 0, 0.3), (4, 7, 1, 0.7), (7, 9, 0, 1.0), (7, 9, 2, 1.0)])
    assert torch.equal(together[4:7], alone)


@PARTS
@pytest.mark.parametrize("threads", [2, 3])
def test_lora_on_any_number_of_threads(dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with more workers than cores, and with fewer rows and columns than workers."""
    pool = make_pool([16, 5, 64, 0, 3], 80, 200, dtype)
    monkeypatch.setattr(numba_ops, "SERIAL_WORK", 0)
    for rows in (1, 2, 7, 33):
        x, y = normal(rows, 80, seed=1, dtype=dtype), normal(rows, 200, seed=2, dtype=dtype)
        spans = [(0, rows, 0, 1.0), (rows // 2, rows, 1, 1.0), (0, rows // 2, 2, 1.0), (0, rows, 4, -1.0)]
        numba_ops.set_num_threads(1)
        serial = add_lora(y, x, pool, spans)
        numba_ops.set_num_threads(threads)
        assert torch.equal(add_lora(y, x, pool, spans), serial)


def test_small_work_stays_on_one_thread() -> None:
    pool = make_pool([16], 80, 200, torch.float32)
    lora = make_segments([(0, 2, 0, 1.0)], pool)
    numba_ops.set_num_threads(2)
    assert numba_ops._workers(lora, 280) == 1
    assert numba_ops._workers(make_segments([(0, 400, 0, 1.0)], pool), 280) == 2


def attend(case: Paged, layer: str) -> Tensor:
    return numba_ops.paged_attention(*case.arguments, LAYERS[layer])


@PARTS
@pytest.mark.parametrize("layer", LAYERS)
def test_attention_for_every_chunk_length(dtype: torch.dtype, layer: str) -> None:
    """The last M tokens as one chunk, M = 1 (decode) to 257 (the whole prompt at once)."""
    whole = attend(make_paged([(0, 257)], HEADS, dtype), layer)
    for length in LENGTHS if layer == "plain" else (1, 2, 3, 5, 16, 64, 65, 200):
        part = attend(make_paged([(257 - length, length)], HEADS, dtype), layer)
        assert torch.equal(part, whole[257 - length :]), length


@PARTS
@pytest.mark.parametrize("layer", LAYERS)
def test_attention_decoded_token_by_token(dtype: torch.dtype, layer: str) -> None:
    """Every position decoded in one batch of single tokens equals the prefill."""
    whole = attend(make_paged([(0, 140)], HEADS, dtype), layer)
    decoded = attend(make_paged([(position, 1) for position in range(140)], HEADS, dtype, names=[0] * 140), layer)
    assert torch.equal(decoded, whole)


@PARTS
@pytest.mark.parametrize("group", [1, 2, 3, 5, 16, 17])
def test_attention_however_a_sequence_is_cut(dtype: torch.dtype, group: int) -> None:
    heads = Heads(group, 1, 20, 70)
    whole = attend(make_paged([(0, 90)], heads, dtype), "plain")
    for cuts in ([1, 64], [63], [64], [65], [16, 32, 48, 64, 80], [33, 34, 35], list(range(1, 90, 7))):
        bounds = [0, *cuts, 90]
        chunks = [
            attend(make_paged([(a, b - a)], heads, dtype), "plain") for a, b in zip(bounds, bounds[1:], strict=False)
        ]
        assert torch.equal(torch.cat(chunks), whole), cuts


@PARTS
@pytest.mark.parametrize("layer", LAYERS)
def test_attention_whatever_the_neighbours_and_blocks(dtype: torch.dtype, layer: str) -> None:
    alone = attend(make_paged([(100, 11)], HEADS, dtype, names=[3]), layer)
    for block_size in (1, 5, 16, 64):
        for where, names in enumerate(([3, 1, 2], [1, 3, 2], [1, 2, 3])):
            chunks = [(100, 11) if name == 3 else (7 * name, 20 * name) for name in names]
            case = make_paged(chunks, HEADS, dtype, block_size, names=names)
            start = int(case.attn.cu_seqlens_q[where])
            assert torch.equal(attend(case, layer)[start : start + 11], alone)


@PARTS
@pytest.mark.parametrize("threads", [2, 3])
def test_attention_on_any_number_of_threads(dtype: torch.dtype, threads: int) -> None:
    """Large and often enough that workers surely run at the same time."""
    case = make_paged([(0, 33), (300, 1), (3, 400)], HEADS, dtype)
    assert 2 * numba_threads.SERIAL_WORK < 400 * 400 * 6 * (64 + 48)
    serial = attend(case, "plain")
    numba_ops.set_num_threads(threads)
    for _ in range(8):
        assert torch.equal(attend(case, "plain"), serial)


def test_workers_run_on_torchs_openmp_threads() -> None:
    """Elsewhere the kernels are right but use one thread; where torch brings OpenMP it must be found."""
    wanted = torch.backends.openmp.is_available() and sys.platform == "linux"
    assert numba_threads.has_openmp() == wanted
