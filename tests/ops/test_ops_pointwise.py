"""RMS norm and gated activation: torch's values and roundings, row by row."""

import pytest
import torch
from torch import nn

from loraplex.ops import numba_ops

DTYPES = [torch.float32, torch.bfloat16]


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float, plus_one: bool) -> torch.Tensor:
    """transformers' LlamaRMSNorm and GemmaRMSNorm."""
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (scaled * (1 + weight.float())).to(x.dtype) if plus_one else weight * scaled.to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 15), (2, 5, 64), (1, 7, 4, 128), (300, 768)])
def test_rms_norm(shape: tuple[int, ...], plus_one: bool, dtype: torch.dtype) -> None:
    x, weight = (3 * torch.randn(shape)).to(dtype), torch.randn(shape[-1]).to(dtype)
    got = numba_ops.rms_norm(x, weight, 1e-5, plus_one=plus_one)
    assert got.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2  # one bfloat16 step where a sum rounds the other way
    torch.testing.assert_close(got, norm(x, weight, 1e-5, plus_one), rtol=tolerance, atol=tolerance)


def test_rms_norm_of_a_view() -> None:
    x, weight = torch.randn(2, 5, 96)[..., :64].transpose(0, 1), torch.randn(64)
    got = numba_ops.rms_norm(x, weight, 1e-6, plus_one=False)
    torch.testing.assert_close(got, norm(x, weight, 1e-6, False), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 15), (1, 5, 64), (300, 2048)])
def test_silu_mul(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    wide = (4 * torch.randn(*shape[:-1], 2 * shape[-1])).to(dtype)
    gate, up = wide.split(shape[-1], dim=-1)
    got = numba_ops.silu_mul(gate, up)
    assert got.is_contiguous()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(got, nn.functional.silu(gate) * up, rtol=tolerance, atol=tolerance)


def test_silu_mul_far_out() -> None:
    gate = torch.tensor([-1e4, -90.0, -20.0, 0.0, 20.0, 90.0, 1e4]).repeat(3)
    torch.testing.assert_close(
        numba_ops.silu_mul(gate, torch.ones(21)), nn.functional.silu(gate), rtol=1e-5, atol=1e-30
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_in_any_batch(dtype: torch.dtype) -> None:
    x, weight = torch.randn(257, 768).to(dtype), torch.randn(768).to(dtype)
    whole, gated = numba_ops.rms_norm(x, weight, 1e-6, plus_one=False), numba_ops.silu_mul(x, x.flip(0))
    before = torch.get_num_threads()
    try:
        for threads, start, end in ((1, 0, 1), (3, 5, 8), (2, 0, 200), (1, 256, 257)):
            torch.set_num_threads(threads)
            assert torch.equal(numba_ops.rms_norm(x[start:end], weight, 1e-6, plus_one=False), whole[start:end])
            assert torch.equal(numba_ops.silu_mul(x[start:end], x.flip(0)[start:end]), gated[start:end])
    finally:
        torch.set_num_threads(before)


def test_values_that_are_no_numbers_stay_so() -> None:
    x = torch.tensor([[1.0, float("nan")], [1.0, 2.0]])
    assert numba_ops.rms_norm(x, torch.ones(2), 1e-6, plus_one=False).isnan().tolist() == [[True, True], [False, False]]
    assert numba_ops.silu_mul(x, torch.ones(2, 2)).isnan().tolist() == [[False, True], [False, False]]
