"""The noise is Gumbel's, and a function of (seed, choice, position, token) alone."""

import itertools
import math

import torch

from loraplex.ops.noise import gumbel_noise, row_key

IDS = torch.arange(50_000)


def test_the_distribution_is_gumbels():
    """Kolmogorov-Smirnov against exp(-exp(-x)), and the mean is Euler's constant."""
    noise = gumbel_noise([row_key(1, 0, 0)], IDS)[0].double().sort().values
    expected = torch.exp(-torch.exp(-noise))
    steps = torch.arange(1, len(noise) + 1) / len(noise)
    assert float((expected - steps).abs().max()) < 1.95 / math.sqrt(len(noise))
    assert abs(float(noise.mean()) - 0.5772) < 0.03
    assert noise.isfinite().all()


def test_draws_of_different_keys_and_neighbouring_tokens_are_uncorrelated():
    keys = [
        row_key(seed, choice, position) for seed, choice, position in itertools.product((0, 1, 2**40), (0, 1), (0, 1))
    ]
    noise = gumbel_noise(keys, IDS).double()
    centred = noise - noise.mean(1, keepdim=True)
    correlation = torch.corrcoef(centred) - torch.eye(len(keys))
    assert float(correlation.abs().max()) < 0.03
    for row in centred:
        assert abs(float((row[1:] * row[:-1]).mean())) < 0.06


def test_the_key_is_the_whole_of_it():
    keys = [row_key(s, c, p) for s, c, p in itertools.product(range(-8, 8), range(8), range(64))]
    assert len(set(keys)) == len(keys)
    key = row_key(7, 1, 3)
    alone = gumbel_noise([key], IDS)[0]
    among = gumbel_noise([row_key(9, 0, 0), key, row_key(7, 1, 4)], IDS)[1]
    assert torch.equal(alone, among)
    some = torch.tensor([[40_000, 3, 17]])
    assert torch.equal(gumbel_noise([key], some)[0], alone[some[0]]), "a token's noise knows nothing of its neighbours"


def test_the_noise_is_fixed_for_ever():
    """The same request gives the same tokens after an upgrade: these are the numbers."""
    keys = [row_key(0, 0, 0), row_key(-1, 2, 3)]
    assert keys == [2558736989570252433, 5193809491884537434]
    noise = gumbel_noise(keys, torch.tensor([0, 1, 127]))
    torch.testing.assert_close(
        noise, torch.tensor([[-1.4195110, 0.1512452, 0.4602185], [0.8100640, -0.4134627, 0.6806848]])
    )
