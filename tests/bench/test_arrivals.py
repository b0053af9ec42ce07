import asyncio
import itertools
import time

import numpy as np
import pytest

from loraplex.bench.arrivals import ClosedLoop, Poisson


def stop_after(count: int):
    counter = itertools.count()
    return lambda: next(counter) < count


def test_poisson_gaps_are_exponential():
    gaps = np.array(list(itertools.islice(Poisson(50.0, seed=1).gaps(), 20_000)))
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.05)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05), "an exponential's deviation is its mean"
    assert (gaps > 1 / 50).mean() == pytest.approx(np.exp(-1), abs=0.02)
    assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < 0.03
    assert gaps[:100].tolist() == list(itertools.islice(Poisson(50.0, seed=1).gaps(), 100))
    assert gaps[:100].tolist() != list(itertools.islice(Poisson(50.0, seed=2).gaps(), 100))


async def test_poisson_does_not_wait_for_answers():
    dues, num_open, most_open = [], 0, 0

    async def send(due: float) -> None:
        nonlocal num_open, most_open
        dues.append(due)
        num_open += 1
        most_open = max(most_open, num_open)
        await asyncio.sleep(0.5)
        num_open -= 1

    arrivals = Poisson(1000.0)
    await arrivals.run(send, stop_after(30))
    assert len(dues) == most_open == 30
    assert np.diff(dues).tolist() == pytest.approx(list(itertools.islice(arrivals.gaps(), 30))[1:], abs=1e-9)
    assert num_open == 0, "it waits for those under way"


async def test_a_late_client_does_not_move_the_due_times():
    """The loop is blocked for a while; requests that were due in it are due then, not afterwards."""
    dues = []

    async def send(due: float) -> None:
        dues.append(due)
        if len(dues) == 2:
            time.sleep(0.2)

    await Poisson(200.0).run(send, stop_after(20))
    assert np.diff(dues).max() < 0.1


async def test_a_closed_loop_keeps_its_clients_busy():
    num_open, seen = 0, []

    async def send(due: float) -> None:
        nonlocal num_open
        num_open += 1
        seen.append(num_open)
        await asyncio.sleep(0.002)
        num_open -= 1

    await ClosedLoop(5).run(send, stop_after(40))
    assert len(seen) == 40
    assert max(seen) == 5
    assert seen[5:] == [5] * 35
