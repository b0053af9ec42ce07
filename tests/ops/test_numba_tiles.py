"""Products on AMX tiles. On a CPU without them there is nothing to test but that they are not used."""

import pytest
import torch

from loraplex.model.linear import is_packed, make_product
from loraplex.ops.numba_tiles import has_tiles, multiply_tiles, pack_tiles, unpack_tiles

SHAPES = [(768, 256), (2048, 64), (64, 48), (100, 70), (33, 1), (1, 33), (300, 1000)]


def matrices(features: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(features * outputs)
    weight = torch.randn(outputs, features, generator=generator) / features**0.5
    x = torch.randn(257, features, generator=generator)
    return weight.bfloat16(), torch.randn(outputs, generator=generator), x.bfloat16()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packing_is_undone(shape: tuple[int, int]):
    weight, _, _ = matrices(*shape)
    packed = pack_tiles(weight)
    assert packed.numel() % (32 * 32) == 0
    assert torch.equal(unpack_tiles(packed, *weight.shape), weight)


def test_products_of_bfloat16_are_on_tiles_where_the_cpu_has_them():
    weight, _, _ = matrices(64, 48)
    name = type(make_product(weight, None)).__name__
    assert (name == "_TiledProduct") == (has_tiles() and is_packed(weight))
    assert type(make_product(weight.float(), None)).__name__ != "_TiledProduct"


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_are_right_and_their_bits_their_own(shape: tuple[int, int], has_bias: bool, threads: int):
    """Over every M from 0 to 257, wherever the row stands, contiguous or not, on one thread or two."""
    if not has_tiles():
        return
    weight, bias, x = matrices(*shape)
    packed = pack_tiles(weight)
    before, addend = torch.get_num_threads(), bias if has_bias else None
    whole = multiply_tiles(x, packed, addend, len(weight))
    expected = x.double() @ weight.double().T + (bias.double() if has_bias else 0)
    # 2^-9 is the rounding of the result to bfloat16, which is all but exact up to there
    torch.testing.assert_close(whole.double(), expected, rtol=2**-8, atol=1e-5)
    torch.set_num_threads(threads)
    try:
        for count in (*range(70), 127, 128, 129, 256, 257):
            assert torch.equal(multiply_tiles(x[:count], packed, addend, len(weight)), whole[:count]), count
            last = x[257 - count :]
            assert torch.equal(multiply_tiles(last, packed, addend, len(weight)), whole[257 - count :]), count
        apart = torch.zeros(257, 2 * shape[0], dtype=torch.bfloat16)[:, : shape[0]].copy_(x)
        assert torch.equal(multiply_tiles(apart, packed, addend, len(weight)), whole)
        across = x.T.contiguous().T
        assert torch.equal(multiply_tiles(across, packed, addend, len(weight)), whole)
    finally:
        torch.set_num_threads(before)


def test_a_row_that_is_not_finite_stays_alone():
    if not has_tiles():
        return
    weight, _, x = matrices(100, 70)
    packed = pack_tiles(weight)
    expected = multiply_tiles(x, packed, None, 70)
    x[5], x[20, 99] = float("nan"), float("inf")
    y = multiply_tiles(x, packed, None, 70)
    assert not y[5].isfinite().any()
    others = [t for t in range(257) if t not in (5, 20)]
    assert torch.equal(y[others], expected[others])
