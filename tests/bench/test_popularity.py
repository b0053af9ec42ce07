import itertools

import numpy as np
import pytest

from loraplex.bench.popularity import Popularity
from loraplex.errors import InvalidRequest

ALL = ["distinct", "identical", "uniform", "zipf:1.0", "zipf:1.5", "hot:0.5", "hot:0.95"]


def draws(text: str, count: int, seed: int, many: int) -> np.ndarray:
    return np.array(list(itertools.islice(Popularity.parse(text).draws(count, seed), many)))


@pytest.mark.parametrize("count", [1, 2, 7, 2000])
@pytest.mark.parametrize("text", ALL)
def test_a_pmf_sums_to_one(text: str, count: int):
    pmf = Popularity.parse(text).pmf(count)
    assert pmf.shape == (count,)
    assert pmf.sum() == pytest.approx(1, abs=1e-12)
    assert (pmf >= 0).all()
    assert pmf[0] == pmf.max()


@pytest.mark.parametrize("text", ALL)
def test_draws_follow_the_pmf(text: str):
    count, many = 50, 40_000
    pmf = Popularity.parse(text).pmf(count)
    found = np.bincount(draws(text, count, seed=3, many=many), minlength=count) / many
    assert np.abs(found - pmf).max() < 5 * np.sqrt(pmf.max() / many), "within five standard deviations"


@pytest.mark.parametrize("text", ALL)
def test_draws_follow_the_seed(text: str):
    first = draws(text, 20, seed=1, many=600)
    assert (first == draws(text, 20, seed=1, many=600)).all()
    if text not in ("distinct", "identical"):
        assert (first != draws(text, 20, seed=2, many=600)).any()


def test_the_shapes_are_what_they_are_called():
    assert draws("distinct", 3, 0, 7).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert set(draws("identical", 9, 0, 50)) == {0}
    zipf = Popularity.parse("zipf:1.0").pmf(1000)
    assert zipf[0] / zipf[9] == pytest.approx(10)
    assert zipf[0] == pytest.approx(1 / sum(1 / k for k in range(1, 1001)))
    hot = Popularity.parse("hot:0.5").pmf(101)
    assert hot[0] == 0.5
    assert hot[1:] == pytest.approx(np.full(100, 0.005))


@pytest.mark.parametrize("text", ["", "zip", "zipf:x", "zipf:-1", "hot:1.5", "uniform:2", "hot:nan"])
def test_others_are_refused(text: str):
    with pytest.raises(InvalidRequest, match="--popularity"):
        Popularity.parse(text)


def test_expected_distinct():
    assert Popularity.parse("uniform").expected_distinct(32, 32) == pytest.approx(32 * (1 - (31 / 32) ** 32))
    assert Popularity.parse("identical").expected_distinct(5, 8) == 1
    assert Popularity.parse("distinct").expected_distinct(32, 20) == 20
    assert Popularity.parse("distinct").expected_distinct(8, 20) == 8
    # by the same formula elsewhere: Zipf 1.0 over 1000 adapters, 64 requests: 44 distinct ones
    assert Popularity.parse("zipf:1.0").expected_distinct(1000, 64) == pytest.approx(44, abs=1)
