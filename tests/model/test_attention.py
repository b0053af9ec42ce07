"""The hook: what it learns of a model, what it refuses, how it treats padding."""

from types import SimpleNamespace

import pytest
import torch

import tiny
from loraplex.errors import UnsupportedModel
from loraplex.model.attention import (
    GeometryProbe,
    KVCache,
    LayerGeometry,
    PagedStep,
    paged_attention_forward,
)
from loraplex.model.loader import measure_geometry, wrap_model
from loraplex.ops import AttentionMetadata, LayerAttention, torch_ops

MODULE = SimpleNamespace(layer_idx=3)


@pytest.mark.parametrize(
    ("model_type", "heads", "dims", "windows", "softcaps"),
    [
        ("llama", 2, 16, [None, None], [None, None]),
        ("qwen2", 2, 16, [None, None], [None, None]),
        ("qwen3", 2, 32, [None, None], [None, None]),
        ("gemma2", 2, 32, [24, None], [50.0, 50.0]),
        ("gpt2", 2, 32, [None, None], [None, None]),
    ],
)
def test_geometry_of_the_models(model_type: str, heads: int, dims: int, windows: list, softcaps: list):
    geometry = measure_geometry(wrap_model(tiny.make_model(model_type)).model)
    assert list(geometry) == [0, 1]
    for layer, window, softcap in zip(geometry.values(), windows, softcaps, strict=True):
        assert (layer.num_kv_heads, layer.key_dim, layer.value_dim) == (heads, dims, dims)
        assert layer.attention == LayerAttention(pytest.approx(dims**-0.5), window, softcap)
        assert layer.num_values == heads * 2 * dims


def tensors(num_tokens: int, *, query_heads: int = 4, value_dim: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    shapes = ((query_heads, 8), (2, 8), (2, value_dim))
    return [torch.randn(1, heads, num_tokens, dim, generator=generator) for heads, dim in shapes]


def test_the_probe_only_looks():
    probe = GeometryProbe()
    sinks = torch.nn.Parameter(torch.ones(4))
    output, weights = paged_attention_forward(
        MODULE, *tensors(1), None, scaling=None, sliding_window=7, softcap=2.0, s_aux=sinks, paged=probe  # type: ignore[arg-type]
    )  # fmt: skip
    assert weights is None
    assert output.shape == (1, 1, 4, 6)
    assert not output.any()
    layer = probe.layers[3]
    assert (layer.num_kv_heads, layer.key_dim, layer.value_dim, layer.num_values) == (2, 8, 6, 28)
    assert (layer.attention.scale, layer.attention.window, layer.attention.softcap) == (8**-0.5, 7, 2.0)
    assert layer.attention.sinks is not None
    assert not layer.attention.sinks.requires_grad


def test_without_the_steps_metadata_it_refuses():
    with pytest.raises(UnsupportedModel, match="keyword"):
        paged_attention_forward(MODULE, *tensors(1), None)  # type: ignore[arg-type]


@pytest.mark.parametrize("padding", [0, 1, 3])
def test_padding_is_neither_stored_nor_read(padding: int):
    """5 tokens of one sequence in blocks of 4, and rows of padding behind them."""
    cache = KVCache({3: LayerGeometry(2, 8, 6, LayerAttention(0.3))}, 4, 4, torch.float32, torch.device("cpu"))
    assert cache.nbytes == 4 * 4 * 2 * (8 + 6) * 4
    slots = torch.tensor([8, 9, 10, 11, 4])
    attn = AttentionMetadata(
        torch.tensor([0, 5], dtype=torch.int32),
        torch.tensor([5], dtype=torch.int32),
        torch.tensor([[2, 1]], dtype=torch.int32),
        slots,
        4,
    )
    step = PagedStep(torch_ops, cache, attn)
    query, key, value = tensors(5)
    padded = [torch.nn.functional.pad(x, (0, 0, 0, padding), value=9.0) for x in (query, key, value)]
    output, _ = paged_attention_forward(MODULE, *padded, None, paged=step)  # type: ignore[arg-type]
    assert step.called == {3}
    assert output.shape == (1, 5 + padding, 4, 6)
    assert not output[0, 5:].any()
    stored = cache.layers[3].k.flatten(0, 1)
    assert torch.equal(stored[slots], key[0].transpose(0, 1))
    assert not stored[[0, 1, 2, 3, 5, 6, 7, 12, 13, 14, 15]].any()
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(output[0, :5], expected[0].transpose(0, 1), rtol=0, atol=1e-5)
