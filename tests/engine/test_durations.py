"""Buckets of durations."""

import pytest

from loraplex.engine.durations import BOUNDS, Durations


def test_each_duration_lands_in_the_first_bucket_that_holds_it():
    durations = Durations()
    for seconds in (0.0, BOUNDS[0], BOUNDS[0] * 1.01, BOUNDS[-1], BOUNDS[-1] * 2):
        durations.observe(seconds)
    counts = durations.counts
    assert counts.counts == (2, 1, *[0] * (len(BOUNDS) - 3), 1, 1)
    assert counts.count == 5
    assert counts.seconds == pytest.approx(BOUNDS[0] * 2.01 + BOUNDS[-1] * 3)
    durations.observe(1.0)
    assert counts.count == 5, "a snapshot stays as it was"
