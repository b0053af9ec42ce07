"""Triton's attention and store_kv: against the equation and the oracle, for prefill, decode and both in one batch."""

from dataclasses import replace

import pytest
import torch
from ops_cases import Heads, Paged, make_paged, normal
from torch import Tensor
from triton_cases import DEVICE, TRITON_DTYPES, on_device

from loraplex.ops import LayerAttention, torch_ops

triton_ops = pytest.importorskip("loraplex.ops.triton_ops", reason="Triton has no build for this platform")
DTYPE = pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)

HEADS = {
    "mha": Heads(3, 3, 32, 32),
    "gqa": Heads(6, 2, 64, 64),
    "many queries": Heads(20, 1, 16, 16),
    "narrow values": Heads(4, 2, 96, 64),
    "odd": Heads(3, 1, 17, 65),
}
LAYERS = {
    "plain": LayerAttention(0.2),
    "window": LayerAttention(0.2, window=7),
    "cap": LayerAttention(0.5, softcap=3.0),
    "sinks": LayerAttention(0.2, sinks=torch.linspace(-3, 4, 20)),
    "all": LayerAttention(0.4, window=33, softcap=5.0, sinks=torch.linspace(4, -3, 20)),
}
MIXED = [(0, 3), (66, 2), (63, 1), (20, 20), (0, 1)]


def layer_for(name: str, heads: Heads) -> LayerAttention:
    layer = LAYERS[name]
    return layer if layer.sinks is None else replace(layer, sinks=layer.sinks[: heads.query].clone())


def run(case: Paged, layer: LayerAttention) -> Tensor:
    there = on_device(case)
    return triton_ops.paged_attention(*there.arguments, on_device(layer)).cpu()


def check(case: Paged, layer: LayerAttention) -> None:
    """Weights are rounded to the values' dtype before they are summed: an error of its eps, of values of size 1."""
    eps = torch.finfo(case.q.dtype).eps
    atol = 4e-6 if case.q.dtype == torch.float32 else 2 * eps
    wanted = torch_ops.paged_attention(*case.arguments, layer)
    torch.testing.assert_close(run(case, layer), wanted, rtol=max(2e-6, eps), atol=atol)


@DTYPE
@pytest.mark.parametrize("heads", HEADS)
def test_attention_is_the_oracles_for_every_shape_of_heads(dtype: torch.dtype, heads: str) -> None:
    check(make_paged(MIXED, HEADS[heads], dtype), layer_for("all", HEADS[heads]))


@DTYPE
@pytest.mark.parametrize("layer", LAYERS)
def test_attention_is_the_oracles_for_every_layer(dtype: torch.dtype, layer: str) -> None:
    check(make_paged(MIXED, HEADS["gqa"], dtype, block_size=3), layer_for(layer, HEADS["gqa"]))


@DTYPE
@pytest.mark.parametrize("layer", ["plain", "all"])
def test_decode_adds_parts_of_the_keys(dtype: torch.dtype, layer: str) -> None:
    """255, 256, 257 and 600 keys: one part, two, three; with a window the first parts are no part of it."""
    heads = HEADS["mha"]
    check(make_paged([(254, 1), (255, 1), (256, 1), (599, 1)], heads, dtype), layer_for(layer, heads))


@DTYPE
def test_a_prompt_longer_than_a_tile(dtype: torch.dtype) -> None:
    check(make_paged([(0, 70), (130, 67)], HEADS["gqa"], dtype), LAYERS["plain"])


@DTYPE
def test_bounds_of_the_host_change_no_bit(dtype: torch.dtype) -> None:
    """They size launches: what is left out had nothing to do."""
    for chunks, most, least in (([(40, 1), (300, 1), (0, 1)], 1, 1), ([(0, 5), (31, 2)], 5, 2)):
        case = make_paged(chunks, HEADS["gqa"], dtype)
        whole = run(case, LAYERS["window"])
        case.attn.max_query_len, case.attn.min_query_len, case.attn.max_seq_len = most, least, 301
        assert torch.equal(run(case, LAYERS["window"]), whole)


@DTYPE
def test_a_sequence_knows_nothing_of_its_neighbours(dtype: torch.dtype) -> None:
    """Bit-equal alone and in a batch, decoding and prefilling."""
    heads = HEADS["gqa"]
    together = run(make_paged([(300, 1), (9, 12), (41, 1), (2, 30)], heads, dtype), LAYERS["plain"])
    alone = run(make_paged([(300, 1)], heads, dtype), LAYERS["plain"])
    assert torch.equal(together[:1], alone)
    alone = run(make_paged([(41, 1)], heads, dtype, names=[2]), LAYERS["plain"])
    assert torch.equal(together[13:14], alone)


@DTYPE
def test_no_new_tokens_and_sequences_of_nothing(dtype: torch.dtype) -> None:
    """As a graph is padded: sequences without tokens, before and after those with."""
    case = make_paged([(5, 0), (0, 2), (9, 0), (7, 1), (0, 0)], HEADS["gqa"], dtype)
    alone = make_paged([(0, 2), (7, 1)], HEADS["gqa"], dtype, names=[1, 3])
    assert torch.equal(run(case, LAYERS["plain"]), run(alone, LAYERS["plain"]))


def test_a_sink_far_above_every_logit_gives_zero() -> None:
    case = make_paged([(3, 2), (5, 1)], HEADS["mha"], torch.float32)
    assert not run(case, LayerAttention(0.1, sinks=torch.full((3,), 200.0))).any()


@DTYPE
def test_a_nan_key_is_seen(dtype: torch.dtype) -> None:
    """A broken adapter must not hide: NaN in a visible key gives NaN, in an invisible one nothing."""
    case = make_paged([(0, 8), (8, 1)], HEADS["gqa"], dtype)
    flat = case.k_cache.flatten(0, 1)
    flat[case.attn.slot_mapping[5], 0, 0] = float("nan")
    flat[case.attn.slot_mapping[8], 0, 0] = float("nan")
    out = run(case, LAYERS["plain"])
    assert out[:5].isfinite().all()
    assert out[5:, :3].isnan().all()
    assert out[:, 3:].isfinite().all()


@DTYPE
@pytest.mark.parametrize("new", [1, 10])
def test_blocks_before_the_window_may_be_gone(dtype: torch.dtype, new: int) -> None:
    """What no new token sees is not read: the block's id may be anything, its memory another's."""
    case = make_paged([(150, new)], HEADS["gqa"], dtype)
    layer = LayerAttention(0.2, window=40)  # the first new token sees 111..150
    wanted = run(case, layer)
    tables = case.attn.block_tables
    case.k_cache[tables[0, 6].long(), :15] = float("nan")
    case.v_cache[tables[0, 6].long(), :15] = float("nan")
    tables[0, :6] = 2**30
    assert torch.equal(run(case, layer), wanted)


@DTYPE
def test_views_of_a_fused_projection(dtype: torch.dtype) -> None:
    """q as transformers passes it: heads before tokens, cut out of one product."""
    case = on_device(make_paged([(3, 6), (4, 1)], HEADS["gqa"], dtype))
    wide = torch.full((7, 6, 80), float("nan"), dtype=dtype, device=DEVICE)
    wide[:, :, 7:71] = case.q
    across = case.q.transpose(0, 1).contiguous().transpose(0, 1)
    wanted = triton_ops.paged_attention(*case.arguments, LAYERS["plain"])
    for q in (wide[:, :, 7:71], across):
        out = triton_ops.paged_attention(q, case.k_cache, case.v_cache, case.attn, LAYERS["plain"])
        assert torch.equal(out, wanted)


def test_heads_beyond_the_kernels_go_the_oracles_way() -> None:
    check(make_paged([(0, 3), (4, 1)], Heads(2, 1, 520, 8), torch.float32), LAYERS["plain"])


@DTYPE
@pytest.mark.parametrize("block_size", [1, 16])
def test_store_kv_writes_its_slots_and_nothing_else(dtype: torch.dtype, block_size: int) -> None:
    blocks = -(-100 // block_size)
    k_cache = normal(blocks, block_size, 3, 24, seed=1, dtype=dtype).to(DEVICE)
    v_cache = normal(blocks, block_size, 3, 40, seed=2, dtype=dtype).to(DEVICE)
    fused = normal(9, 3, 24 + 40, seed=3, dtype=dtype).to(DEVICE)
    k, v = fused[..., :24], fused[..., 24:]
    slots = torch.randperm(blocks * block_size, generator=torch.Generator().manual_seed(0))[:9].to(DEVICE)
    wanted_k, wanted_v = k_cache.clone(), v_cache.clone()
    torch_ops.store_kv(k[1:], v[1:], wanted_k, wanted_v, slots[1:])
    slots[0] = -1  # padding
    triton_ops.store_kv(k, v, k_cache, v_cache, slots)
    assert torch.equal(k_cache, wanted_k)
    assert torch.equal(v_cache, wanted_v)


def test_store_kv_takes_heads_first() -> None:
    """k and v as transformers passes them, heads before tokens, into one layer of a cache of all layers."""
    caches = torch.zeros(3, 2, 4, 8, 2, 16, device=DEVICE)
    k, v = (normal(2, 5, 16, seed=seed).transpose(0, 1).to(DEVICE) for seed in (1, 2))
    slots = torch.tensor([7, 8, 31, 0, 16], device=DEVICE)
    triton_ops.store_kv(k, v, caches[1, 0], caches[1, 1], slots)
    assert torch.equal(caches[1, 0].flatten(0, 1)[slots], k)
    assert torch.equal(caches[1, 1].flatten(0, 1)[slots], v)
    assert caches.count_nonzero() == 2 * k.numel()
