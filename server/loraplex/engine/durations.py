"""Durations: how long something took, counted in buckets as Prometheus does."""

from bisect import bisect_left
from dataclasses import dataclass

BOUNDS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 10.24)
"""Upper bounds of the buckets in seconds; one more, without a bound, follows."""


@dataclass(frozen=True, slots=True)
class DurationCounts:
    """`counts` of each bucket (not cumulative), `seconds` of all together. Picklable."""

    counts: tuple[int, ...]
    seconds: float

    @property
    def count(self) -> int:
        return sum(self.counts)


class Durations:
    """Written by one thread."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS) + 1)
        self._seconds = 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(BOUNDS, seconds)] += 1
        self._seconds += seconds

    @property
    def counts(self) -> DurationCounts:
        """What was observed so far."""
        return DurationCounts(tuple(self._counts), self._seconds)
