"""draw: the noise of `noise`, the argmax of the whole row, and nothing of the neighbours."""

import pytest
import torch

from loraplex.ops import numba_ops, torch_ops
from loraplex.ops.noise import gumbel_noise, row_key


def keys(count: int, seed: int = 0) -> list[int]:
    return [row_key(seed, 0, position) for position in range(count)]


@pytest.mark.parametrize("vocabulary", [1, 2, 15, 16, 17, 1000, 32_001, 152_064])
def test_the_kernel_draws_what_the_formula_says(vocabulary: int) -> None:
    """Up to rounding: where they differ, the two candidates are equal to the last bits."""
    logits = torch.randn(40, vocabulary, generator=torch.Generator().manual_seed(vocabulary)) * 2
    got = numba_ops.draw(logits, keys(40))
    noisy = logits + gumbel_noise(keys(40), torch.arange(vocabulary))
    chosen = noisy.gather(1, got.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(chosen, noisy.amax(-1), rtol=1e-5, atol=1e-5)
    assert int((got != torch_ops.draw(logits, keys(40))).sum()) <= 1


@pytest.mark.parametrize("ops", [torch_ops, numba_ops], ids=["torch", "numba"])
def test_a_row_knows_nothing_of_its_batch(ops) -> None:
    logits = torch.randn(9, 5000)
    whole = ops.draw(logits, keys(9))
    for row in range(9):
        assert int(ops.draw(logits[row : row + 1], [keys(9)[row]])) == int(whole[row])
    assert torch.equal(ops.draw(torch.cat([logits, logits], dim=1)[:, :5000], keys(9)), whole), "a row stride"


@pytest.mark.parametrize("ops", [torch_ops, numba_ops], ids=["torch", "numba"])
def test_what_is_masked_is_never_drawn(ops) -> None:
    logits = torch.full((200, 300), -torch.inf)
    logits[:, 7], logits[:, 299] = 0.0, -3.0
    drawn = set(ops.draw(logits, keys(200)).tolist())
    assert drawn == {7, 299}


@pytest.mark.parametrize("ops", [torch_ops, numba_ops], ids=["torch", "numba"])
def test_frequencies_are_the_softmax(ops) -> None:
    """Chi-square over 18 tokens, of which the last two are beyond one vector of lanes."""
    logits = torch.linspace(-2, 2, 18)
    count = 20_000
    drawn = ops.draw(logits.expand(count, -1).contiguous(), keys(count, seed=5))
    observed = torch.bincount(drawn, minlength=18).double()
    expected = logits.double().softmax(-1) * count
    assert float(((observed - expected) ** 2 / expected).sum()) < 50  # 17 degrees of freedom: p < 1e-4 beyond


def test_threads_change_nothing() -> None:
    logits = torch.randn(33, 32_000)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = numba_ops.draw(logits, keys(33))
        torch.set_num_threads(3)
        assert torch.equal(numba_ops.draw(logits, keys(33)), one)
    finally:
        torch.set_num_threads(before)


def test_other_dtypes_take_the_formula() -> None:
    logits = torch.randn(4, 100).bfloat16()
    assert torch.equal(numba_ops.draw(logits, keys(4)), torch_ops.draw(logits, keys(4)))
