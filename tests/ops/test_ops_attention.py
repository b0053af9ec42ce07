"""store_kv and paged_attention: both implementations against plain algebra, and against each other."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import DTYPES, Heads, Paged, make_paged, normal
from torch import Tensor

from loraplex.ops import LayerAttention, numba_ops, torch_ops

IMPLEMENTATIONS = pytest.mark.parametrize("ops", [torch_ops, numba_ops], ids=["torch", "numba"])
ALL_DTYPES = pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)

HEADS = {
    "mha": Heads(3, 3, 32, 32),
    "gqa": Heads(6, 2, 64, 64),
    "mqa": Heads(5, 1, 80, 80),
    "many queries": Heads(20, 1, 16, 16),
    "128": Heads(4, 2, 128, 128),
    "narrow values": Heads(4, 2, 96, 64),
    "wide values": Heads(2, 2, 40, 72),
    "tiny": Heads(2, 1, 4, 1),
    "odd": Heads(3, 1, 17, 65),
}
LAYERS = {
    "plain": LayerAttention(0.2),
    "window 1": LayerAttention(0.2, window=1),
    "window 7": LayerAttention(0.2, window=7),
    "window 64": LayerAttention(0.2, window=64),
    "window 65": LayerAttention(0.2, window=65),
    "wide window": LayerAttention(0.2, window=4096),
    "cap": LayerAttention(0.5, softcap=3.0),
    "cap 50": LayerAttention(0.1, softcap=50.0),
    "sinks": LayerAttention(0.2, sinks=torch.linspace(-3, 4, 20)),
    "all": LayerAttention(0.4, window=33, softcap=5.0, sinks=torch.linspace(4, -3, 20)),
}


def attend_one_query(q: Tensor, keys: Tensor, values: Tensor, layer: LayerAttention, head: int) -> Tensor:
    """The equation for one query [D] over the keys [n, D] it sees, in float64, in plain Python."""
    logits = [layer.scale * float(q @ key) for key in keys]
    if layer.softcap is not None:
        logits = [layer.softcap * math.tanh(logit / layer.softcap) for logit in logits]
    weights = [math.exp(logit) for logit in logits]
    total = sum(weights)
    if layer.sinks is not None:
        total += math.exp(float(layer.sinks[head]))
    result = torch.zeros(values.shape[1], dtype=torch.float64)
    for weight, value in zip(weights, values, strict=True):
        result += weight / total * value
    return result


def expected(case: Paged, layer: LayerAttention) -> Tensor:
    """attend_one_query for every token and head, float64 [T, Hq, Dv]."""
    cu, out = case.attn.cu_seqlens_q.tolist(), []
    for i, (keys, values) in enumerate(zip(case.keys, case.values, strict=True)):
        queries = case.q[cu[i] : cu[i + 1]].double()
        group = queries.shape[1] // keys.shape[1]
        for t, query in enumerate(queries):
            position = len(keys) - len(queries) + t
            first = 0 if layer.window is None else max(0, position + 1 - layer.window)
            k, v = keys[first : position + 1].double(), values[first : position + 1].double()
            rows = [attend_one_query(query[h], k[:, h // group], v[:, h // group], layer, h) for h in range(len(query))]
            out.append(torch.stack(rows))
    return torch.stack(out)


def with_sinks_for(layer: LayerAttention, heads: Heads) -> LayerAttention:
    if layer.sinks is None:
        return layer
    return LayerAttention(layer.scale, layer.window, layer.softcap, layer.sinks[: heads.query].contiguous())


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps, "atol": 4e-6}


@IMPLEMENTATIONS
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("heads", ["gqa", "tiny"])
def test_attention_is_its_equation(ops, layer: str, heads: str) -> None:
    case = make_paged([(0, 3), (66, 2), (63, 1), (5, 4)], HEADS[heads], torch.float32)
    layer_attention = with_sinks_for(LAYERS[layer], HEADS[heads])
    out = ops.paged_attention(*case.arguments, layer_attention)
    torch.testing.assert_close(out.double(), expected(case, layer_attention), rtol=1e-5, atol=4e-6)


@ALL_DTYPES
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("layer", ["plain", "all"])
def test_numba_equals_torch_for_every_head_shape(dtype: torch.dtype, heads: str, layer: str) -> None:
    case = make_paged([(0, 70), (130, 1), (0, 1), (64, 9), (63, 3)], HEADS[heads], dtype)
    layer_attention = with_sinks_for(LAYERS[layer], HEADS[heads])
    out = numba_ops.paged_attention(*case.arguments, layer_attention)
    assert out.dtype == dtype
    assert out.shape == (84, HEADS[heads].query, HEADS[heads].value_size)
    torch.testing.assert_close(out, torch_ops.paged_attention(*case.arguments, layer_attention), **tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("block_size", [1, 3, 16, 64])
def test_numba_equals_torch_for_every_layer_and_block_size(dtype: torch.dtype, layer: str, block_size: int) -> None:
    case = make_paged([(0, 64), (64, 1), (63, 1), (200, 20), (127, 3), (1, 1)], HEADS["gqa"], dtype, block_size)
    layer_attention = with_sinks_for(LAYERS[layer], HEADS["gqa"])
    out = numba_ops.paged_attention(*case.arguments, layer_attention)
    torch.testing.assert_close(out, torch_ops.paged_attention(*case.arguments, layer_attention), **tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits_neither_overflow_nor_vanish(dtype: torch.dtype) -> None:
    case = make_paged([(100, 3), (0, 5)], HEADS["gqa"], dtype)
    layer = LayerAttention(40.0)
    out = numba_ops.paged_attention(*case.arguments, layer)
    reference = torch_ops.paged_attention(*case.arguments, layer)
    torch.testing.assert_close(out, reference, rtol=tolerance(dtype)["rtol"] + 1e-3, atol=1e-3)


def test_a_sink_far_above_every_logit_gives_zero() -> None:
    case = make_paged([(3, 2)], HEADS["mha"], torch.float32)
    out = numba_ops.paged_attention(*case.arguments, LayerAttention(0.1, sinks=torch.full((3,), 200.0)))
    assert torch.equal(out, torch.zeros_like(out))


@IMPLEMENTATIONS
def test_views_of_a_fused_projection(ops) -> None:
    """q as transformers passes it: heads before tokens, cut out of one product."""
    heads = Heads(4, 2, 32, 32)
    case = make_paged([(3, 6)], heads, torch.float32)
    wide = torch.full((6, 4, 50), float("nan"))
    wide[:, :, 7:39] = case.q
    across = case.q.transpose(0, 1).contiguous().transpose(0, 1)
    wanted = torch_ops.paged_attention(*case.arguments, LAYERS["plain"])
    for q in (wide[:, :, 7:39], across):
        out = ops.paged_attention(q, case.k_cache, case.v_cache, case.attn, LAYERS["plain"])
        torch.testing.assert_close(out, wanted)


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_new_tokens(ops, dtype: torch.dtype) -> None:
    case = make_paged([(5, 0), (0, 2), (9, 0)], HEADS["gqa"], dtype)
    out = ops.paged_attention(*case.arguments, LAYERS["plain"])
    alone = make_paged([(0, 2)], HEADS["gqa"], dtype, names=[1])
    torch.testing.assert_close(out, ops.paged_attention(*alone.arguments, LAYERS["plain"]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_key_is_seen(dtype: torch.dtype) -> None:
    """A broken adapter must not hide: NaN in a visible key gives NaN, in an invisible one nothing."""
    case = make_paged([(0, 8)], HEADS["gqa"], dtype)
    case.k_cache.flatten(0, 1)[case.attn.slot_mapping[5], 0, 0] = float("nan")
    out = numba_ops.paged_attention(*case.arguments, LAYERS["plain"])
    assert out[:5].isfinite().all()
    assert out[5:, :3].isnan().all()
    assert out[:, 3:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_before_the_window_may_be_gone(dtype: torch.dtype) -> None:
    """What no new token sees is not read: the block's id may be anything, its memory another's."""
    case = make_paged([(150, 10)], HEADS["gqa"], dtype)
    layer = LayerAttention(0.2, window=40)  # the first new token sees 111..150: block 6 (96..111) is the first in use
    wanted = numba_ops.paged_attention(*case.arguments, layer)
    tables = case.attn.block_tables
    case.k_cache[tables[0, 6].long(), :15] = float("nan")
    case.v_cache[tables[0, 6].long(), :15] = float("nan")
    tables[0, :6] = 2**30
    assert torch.equal(numba_ops.paged_attention(*case.arguments, layer), wanted)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Paged, LayerAttention]:
    kv, group = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    heads = Heads(kv * group, kv, draw(st.integers(1, 70)), draw(st.integers(1, 70)))
    chunk = st.tuples(st.integers(0, 140), st.integers(1, 40))
    chunks = draw(st.lists(chunk, min_size=1, max_size=4))
    case = make_paged(chunks, heads, draw(st.sampled_from(DTYPES)), draw(st.integers(1, 64)), seed=1)
    layer = LayerAttention(
        0.3,
        draw(st.none() | st.integers(1, 150)),
        draw(st.none() | st.sampled_from([2.0, 30.0])),
        draw(st.none() | st.just(normal(heads.query, seed=5))),
    )
    return case, layer


@settings(max_examples=60)
@given(cases())
def test_numba_equals_torch_on_any_batch(drawn: tuple[Paged, LayerAttention]) -> None:
    case, layer = drawn
    out = numba_ops.paged_attention(*case.arguments, layer)
    torch.testing.assert_close(out, torch_ops.paged_attention(*case.arguments, layer), **tolerance(out.dtype))


@IMPLEMENTATIONS
@ALL_DTYPES
@pytest.mark.parametrize("block_size", [1, 16, 64])
def test_store_kv_writes_its_slots_and_nothing_else(ops, dtype: torch.dtype, block_size: int) -> None:
    blocks = -(-100 // block_size)
    k_cache = normal(blocks, block_size, 2, 24, seed=1, dtype=dtype)
    v_cache = normal(blocks, block_size, 2, 40, seed=2, dtype=dtype)
    fused = normal(9, 2, 24 + 40, seed=3, dtype=dtype)
    k, v = fused[..., :24], fused[..., 24:]
    slots = torch.randperm(blocks * block_size)[:9]
    wanted_k, wanted_v = k_cache.clone(), v_cache.clone()
    for t, slot in enumerate(slots.tolist()):
        wanted_k[slot // block_size, slot % block_size] = k[t]
        wanted_v[slot // block_size, slot % block_size] = v[t]
    ops.store_kv(k, v, k_cache, v_cache, slots)
    assert torch.equal(k_cache, wanted_k)
    assert torch.equal(v_cache, wanted_v)


@IMPLEMENTATIONS
def test_store_kv_takes_heads_first(ops) -> None:
    """k and v as transformers passes them, heads before tokens, into one layer of a cache of all layers."""
    caches = torch.zeros(3, 2, 4, 8, 2, 16)
    k, v = (normal(2, 5, 16, seed=seed).transpose(0, 1) for seed in (1, 2))
    slots = torch.tensor([7, 8, 31, 0, 16])
    ops.store_kv(k, v, caches[1, 0], caches[1, 1], slots)
    assert torch.equal(caches[1, 0].flatten(0, 1)[slots], k)
    assert torch.equal(caches[1, 1].flatten(0, 1)[slots], v)
    assert caches.count_nonzero() == 2 * k.numel()
