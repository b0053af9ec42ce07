"""What was seen of one target of a route: counts and times over a sliding window, and since the start.

Times go into bins that grow by 5 per cent, so a quantile is right to 2.5 per cent in a few hundred numbers. The clock
is given in (seconds, monotonic).
"""

import math
import threading
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

WINDOW = 600.0
"""Seconds that are remembered."""
_BUCKET = 10.0
_GROWTH = math.log(1.05)
_LEAST = 1e-5


@dataclass(slots=True)
class Observed:
    """Counts of requests, and histograms of times.

    drawn, ruled    came here by weight, by a rule
    answered        ended well
    failed          ended with an error that is not the client's; `non_finite` of them with NaN
    aborted         the client went away
    unavailable     could not run here: the target was missing or in quarantine
    over_limit      did not run here: max_running
    dropped         shadows that found no room
    """

    drawn: int = 0
    ruled: int = 0
    answered: int = 0
    failed: int = 0
    non_finite: int = 0
    aborted: int = 0
    unavailable: int = 0
    over_limit: int = 0
    dropped: int = 0
    ttft: Counter[int] = field(default_factory=Counter)
    between: Counter[int] = field(default_factory=Counter)
    ttft_seconds: float = 0.0
    between_seconds: float = 0.0

    @property
    def ended(self) -> int:
        return self.answered + self.failed + self.unavailable

    @property
    def error_rate(self) -> float:
        return (self.failed + self.unavailable) / self.ended if self.ended else 0.0

    def add(self, other: "Observed", with_times: bool = True) -> None:
        """`with_times` False: the counts alone, at a tenth of the cost."""
        self.drawn += other.drawn
        self.ruled += other.ruled
        self.answered += other.answered
        self.failed += other.failed
        self.non_finite += other.non_finite
        self.aborted += other.aborted
        self.unavailable += other.unavailable
        self.over_limit += other.over_limit
        self.dropped += other.dropped
        if with_times:
            self.ttft.update(other.ttft)
            self.between.update(other.between)
            self.ttft_seconds += other.ttft_seconds
            self.between_seconds += other.between_seconds


class Window:
    """`total` since the start; `since` for what is recent. Any thread may call any method."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.total = Observed()
        self._buckets: deque[tuple[float, Observed]] = deque()
        self._marked = -math.inf

    def count(self, name: str, now: float) -> None:
        with self._lock:
            for one in self._both(now):
                setattr(one, name, getattr(one, name) + 1)

    def time(self, name: str, seconds: float, now: float) -> None:
        """`name`: "ttft" or "between"."""
        of = bin_of(seconds)
        with self._lock:
            for one in self._both(now):
                getattr(one, name)[of] += 1
                setattr(one, f"{name}_seconds", getattr(one, f"{name}_seconds") + seconds)

    def mark(self, now: float) -> None:
        """From here on `since_mark` counts."""
        with self._lock:
            self._marked = now

    def since(self, seconds: float, now: float) -> Observed:
        return self._sum(now - seconds)

    def since_mark(self, seconds: float, now: float, with_times: bool = True) -> Observed:
        """At most `seconds` back, and not beyond the mark."""
        return self._sum(max(now - seconds, self._marked), with_times)

    def _sum(self, start: float, with_times: bool = True) -> Observed:
        seen = Observed()
        with self._lock:
            for began, bucket in self._buckets:
                if began >= start:
                    seen.add(bucket, with_times)
        return seen

    def everything(self) -> Observed:
        """A copy of `total`."""
        seen = Observed()
        with self._lock:
            seen.add(self.total)
        return seen

    def _both(self, now: float) -> tuple[Observed, Observed]:
        buckets = self._buckets
        if not buckets or now - buckets[-1][0] >= _BUCKET or buckets[-1][0] < self._marked:
            buckets.append((now, Observed()))
            while buckets[0][0] < now - WINDOW:
                buckets.popleft()
        return self.total, buckets[-1][1]


def bin_of(seconds: float) -> int:
    return int(math.log(max(seconds, _LEAST) / _LEAST) / _GROWTH)


def edge_of(of: int) -> float:
    """The upper edge of a bin, in seconds."""
    return _LEAST * math.exp((of + 1) * _GROWTH)


def quantile(times: Counter[int], share: float) -> float | None:
    """In seconds; None without times."""
    wanted = share * times.total()
    for of in sorted(times):
        wanted -= times[of]
        if wanted <= 0:
            return _LEAST * math.exp((of + 0.5) * _GROWTH)
    return None


def cumulative(times: Counter[int], bounds: Iterable[float]) -> list[int]:
    """How many lie at or below each bound, to the precision of the bins."""
    return [sum(count for of, count in times.items() if edge_of(of) <= bound * 1.05) for bound in bounds]
