"""Dense products through the LoRA kernels: right, and the same bits for a row in every batch."""

import pytest
import torch
from torch import nn

from loraplex.model.dense import RowInvariantLinear, StackedProduct, multiply
from loraplex.ops import select_ops, torch_ops

OPS = select_ops("cpu")
BOTH = pytest.mark.parametrize("ops", [OPS, torch_ops], ids=["cpu", "torch"])
SIZES = [(64, 48), (512, 30), (130, 7)]


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("in_features", "out_features"), SIZES)
def test_each_run_by_its_own_weight(ops, in_features: int, out_features: int, transposed: bool, dtype: torch.dtype):
    weight = (torch.randn(3, out_features, in_features) / in_features**0.5).to(dtype)
    x = torch.randn(40, in_features).to(dtype)
    stacked = weight.mT.contiguous() if transposed else weight
    product = StackedProduct(ops, stacked, transposed)
    assert (product.in_features, product.out_features) == (in_features, out_features)
    runs = [(2, 0, 11), (0, 11, 12), (1, 12, 40)]
    y = product(x, runs)
    assert y.dtype == dtype
    for expert, start, end in runs:
        expected = x[start:end].float() @ weight[expert].float().T
        torch.testing.assert_close(y[start:end], expected.to(dtype), rtol=1e-2, atol=1e-2)
    for start, end in ((0, 1), (5, 11), (3, 7)) if ops is OPS and dtype != torch.float16 else ():
        assert torch.equal(product(x[start:end], [(2, 0, end - start)]), y[start:end])


@BOTH
def test_multiply_keeps_float32(ops):
    x, weight = torch.randn(5, 32).bfloat16(), torch.randn(9, 32).bfloat16()
    y = multiply(ops, x, weight)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, x.float() @ weight.float().T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [None, torch.randn(6)])
def test_linears_inside_the_block_are_row_invariant(bias: torch.Tensor | None):
    x, weight = torch.randn(2, 30, 512), torch.randn(6, 512)
    expected = nn.functional.linear(x, weight, bias)
    with RowInvariantLinear(OPS):
        y = nn.functional.linear(x, weight, bias)
        alone = nn.functional.linear(x[:1, 7:8], weight, bias)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-3)
    assert torch.equal(alone, y[:1, 7:8])


def test_other_functions_inside_the_block_are_torchs():
    x = torch.randn(4, 5)
    with RowInvariantLinear(OPS):
        assert torch.equal(torch.softmax(x, -1), x.softmax(-1))
        assert torch.equal(nn.functional.linear(x, torch.ones(5)), x @ torch.ones(5))
