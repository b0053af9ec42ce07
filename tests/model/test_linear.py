"""The base's product: right, and a row's result is its own whatever stands beside it."""

import pytest
import torch
from torch import nn

import loraplex.model.linear as linear
from loraplex.model.linear import ROW_MULTIPLE, is_row_invariant, make_product

SHAPES = [(64, 48), (96, 128), (768, 256), (2048, 64)]


def matrices(in_features: int, out_features: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator, dtype=torch.float32) / in_features**0.5
    return weight.to(dtype), torch.randn(out_features, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_definition(shape: tuple[int, int], has_bias: bool, dtype: torch.dtype):
    weight, bias = matrices(*shape, dtype)
    product = make_product(weight, bias if has_bias else None)
    for count in (1, 2, 3, 4, 5, 9):
        x = torch.randn(count, shape[0], generator=torch.Generator().manual_seed(count)).to(dtype)
        y = product(x)
        expected = x.double() @ weight.double().T + (bias.double() if has_bias else 0)
        assert y.shape == (count, shape[1])
        assert y.dtype == dtype
        torch.testing.assert_close(
            y.double(), expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 3e-2 * expected.abs().max().item()
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [*SHAPES, (100, 70)], ids=str)
def test_the_weight_comes_back_bit_by_bit(shape: tuple[int, int], dtype: torch.dtype):
    weight, bias = matrices(*shape, dtype)
    kept = weight.clone()
    product = make_product(weight, bias)
    assert torch.equal(product.weight(), kept)
    assert product.weight().shape == kept.shape
    assert product.weight().dtype == dtype


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_rows_bits_are_its_own_in_any_batch(shape: tuple[int, int]):
    """Over every M from 1 to 257, wherever the row stands, on machines where the probe says so."""
    weight, bias = matrices(*shape, torch.float32)
    product = make_product(weight, bias)
    x = torch.randn(257, shape[0], generator=torch.Generator().manual_seed(1))
    if not is_row_invariant(product, shape[0], torch.float32, torch.device("cpu")):
        assert not torch.cpu.get_capabilities().get("avx512_f") or isinstance(product, linear._PlainProduct)
        return
    whole = product(x)
    for count in range(1, 258):
        assert torch.equal(product(x[:count]), whole[:count]), f"{count} rows"
        assert torch.equal(product(x[257 - count :]), whole[257 - count :]), f"the last {count} rows"


@pytest.mark.parametrize("fault", [1, 20, 48, 257])
def test_the_probe_notices_a_kernel_of_its_own(fault: int):
    weight, _ = matrices(64, 48, torch.float32)

    def product(x: torch.Tensor) -> torch.Tensor:
        y = x.double() @ weight.double().T
        return torch.nextafter(y, y + 1) if len(x) == fault else y

    assert not is_row_invariant(product, 64, torch.float32, torch.device("cpu"))
    assert is_row_invariant(lambda x: x.cumsum(1), 64, torch.float32, torch.device("cpu"))


def test_the_row_multiple_pads_what_the_product_would_treat_apart(monkeypatch: pytest.MonkeyPatch):
    weight, _ = matrices(64, 48, torch.float32)
    product = make_product(weight, None)
    if not isinstance(product, linear._PackedProduct):
        assert not linear.is_packed(weight)
        return
    seen = []
    multiply = product._multiply
    monkeypatch.setattr(product, "_multiply", lambda x, *rest: seen.append(len(x)) or multiply(x, *rest))
    for count in (1, 3, 4, 6):
        assert len(product(torch.randn(count, 64))) == count
    assert all(count % ROW_MULTIPLE == 0 for count in seen)


def test_the_way_without_packing(monkeypatch: pytest.MonkeyPatch):
    weight, bias = matrices(64, 48, torch.float32)
    x = torch.randn(5, 64)
    packed = make_product(weight, bias)(x)
    monkeypatch.setattr(linear, "is_packed", lambda weight: False)
    plain = make_product(weight, bias)
    assert isinstance(plain, linear._PlainProduct)
    assert torch.equal(plain(x), nn.functional.linear(x, weight, bias))
    torch.testing.assert_close(plain(x), packed, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_weight_is_never_written(dtype: torch.dtype):
    weight, bias = matrices(64, 48, dtype)
    before = weight.clone(), bias.clone()
    make_product(weight, bias)(torch.randn(3, 64).to(dtype))
    assert torch.equal(weight, before[0])
    assert torch.equal(bias, before[1])
