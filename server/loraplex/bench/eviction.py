"""EvictionBench: recorded orders of requests replayed against the RAM tier under each eviction policy.

The tier is the engine's own `AdapterCache`; nothing is loaded, so nothing is timed. A request leases its adapter until
`in_flight` others have come. The cost of a load is that of `Lrfu`: FIXED_BYTES and the adapter's own.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from loraplex.bench.popularity import Popularity
from loraplex.engine.adapter_cache import AdapterCache
from loraplex.engine.eviction import NAMES, EvictionPolicy, Lrfu, eviction_policy

RANKS = (8, 16, 32, 64)
RANK_BYTES = 5_210_112 // 16
"""Of an adapter of rank 1 on all linears of the benchmarks' base, in bfloat16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictionSettings:
    """adapters   registered
    in_ram        of mean size
    in_flight     requests at once
    """

    adapters: int = 1000
    in_ram: int = 100
    requests: int = 20_000
    in_flight: int = 32
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Trace:
    """`requests` int [requests]: which adapter each asks for. `sizes` int [adapters], bytes."""

    name: str
    requests: np.ndarray
    sizes: np.ndarray


@dataclass(frozen=True, slots=True)
class Sized:
    """As much of an adapter as the RAM tier looks at."""

    digest: str
    nbytes: int


class Gdsf:
    """GreedyDual-Size-Frequency (Cherkasova, HPL-98-69): for comparison. Forgets what leaves.

    worth = clock + uses · cost / nbytes; the clock is the largest worth that has left.
    """

    def __init__(self) -> None:
        self._clock = 0.0
        self._uses: dict[str, int] = {}
        self._weight: dict[str, float] = {}
        self._worth: dict[str, float] = {}

    def insert(self, digest: str, nbytes: int) -> None:
        self._uses[digest] = 0
        self._weight[digest] = (Lrfu.FIXED_BYTES + nbytes) / nbytes
        self._worth[digest] = self._clock

    def use(self, digest: str) -> None:
        self._uses[digest] += 1
        self._worth[digest] = self._clock + self._uses[digest] * self._weight[digest]

    def remove(self, digest: str) -> None:
        self._clock = max(self._clock, self._worth.pop(digest))
        del self._uses[digest], self._weight[digest]

    def worth(self, digest: str) -> float:
        return self._worth[digest]


class Clairvoyant:
    """Knows the trace and lets go what is needed last (Belady 1966; the best where all sizes are equal): the bound."""

    def __init__(self, requests: np.ndarray) -> None:
        self._next: dict[str, deque[int]] = {}
        for index, adapter in enumerate(requests.tolist()):
            self._next.setdefault(str(adapter), deque()).append(index)
        self._now = -1

    def arrive(self) -> None:
        """The next request of the trace is there."""
        self._now += 1

    def insert(self, digest: str, nbytes: int) -> None: ...

    def use(self, digest: str) -> None: ...

    def remove(self, digest: str) -> None: ...

    def worth(self, digest: str) -> float:
        ahead = self._next[digest]
        while ahead and ahead[0] <= self._now:
            ahead.popleft()
        return -ahead[0] if ahead else float("-inf")


class EvictionBench:
    def __init__(self, settings: EvictionSettings):
        self._settings = settings

    @property
    def policies(self) -> Mapping[str, Callable[[Trace], EvictionPolicy]]:
        own = {name: lambda _, name=name: eviction_policy(name) for name in NAMES}
        return {**own, "gdsf": lambda _: Gdsf(), "clairvoyant": lambda trace: Clairvoyant(trace.requests)}

    @property
    def num_replays(self) -> int:
        return len(self.policies) * len(list(self.traces()))

    def run(self, on_each: Callable[[], object] = lambda: None) -> dict[str, Any]:
        """{"settings", "policies", "rows"}; a row is a trace and, by policy, `replay`."""
        rows = []
        for trace in self.traces():
            row: dict[str, Any] = {"trace": trace.name, "policies": {}}
            for name, make in self.policies.items():
                row["policies"][name] = self.replay(trace, make(trace))
                on_each()
            rows.append(row)
        return {"settings": asdict(self._settings), "policies": list(self.policies), "rows": rows}

    def traces(self) -> Iterator[Trace]:
        """Each with adapters of one size, then of ranks 8 to 64."""
        settings = self._settings
        for is_mixed in (False, True):
            generator = np.random.default_rng(settings.seed)
            count = settings.adapters
            sizes = np.full(count, 16 * RANK_BYTES)
            if is_mixed:
                sizes = generator.choice(RANKS, count) * RANK_BYTES
            ending = ", ranks 8 to 64" if is_mixed else ""
            for name, requests in self._orders(generator):
                yield Trace(name + ending, requests, sizes)

    def _orders(self, generator: np.random.Generator) -> Iterator[tuple[str, np.ndarray]]:
        count, length = self._settings.adapters, self._settings.requests
        every = np.arange(count)

        def zipf(exponent: float, ranking: np.ndarray, requests: int) -> np.ndarray:
            return ranking[generator.choice(count, requests, p=Popularity("zipf", exponent).pmf(count))]

        ranking = generator.permutation(every)
        yield "Zipf 1.0", zipf(1.0, ranking, length)
        yield "Zipf 0.7", zipf(0.7, ranking, length)
        part = max(1, length // 10)
        hot_sets = [zipf(1.0, generator.permutation(every), part) for _ in range(10)]
        yield f"Zipf 1.0, other ranking every {part}", np.concatenate(hot_sets)
        step, shift = max(1, length // 40), max(1, count // 50)
        drift = [zipf(1.0, np.roll(ranking, index * shift), step) for index in range(40)]
        yield f"Zipf 1.0, ranks move by {shift} every {step}", np.concatenate(drift)
        scan = max(1, length // 5)
        mixed = [
            part for _ in range(5) for part in (zipf(1.0, ranking, max(1, scan - count // 2)), every[: count // 2])
        ]
        yield f"Zipf 1.0 with scans of {count // 2}", np.concatenate(mixed)
        yield "uniform", generator.integers(0, count, length)

    def replay(self, trace: Trace, policy: EvictionPolicy) -> dict[str, float]:
        """hit_rate, byte_hit_rate; cost_bytes: of all loads, for each request."""
        sizes = trace.sizes.tolist()
        cache = AdapterCache(round(self._settings.in_ram * float(trace.sizes.mean())), policy=policy)
        running: deque[str] = deque()
        hits = hit_bytes = cost = 0
        for adapter in trace.requests.tolist():
            digest, nbytes = str(adapter), sizes[adapter]
            if isinstance(policy, Clairvoyant):
                policy.arrive()
            if len(running) == self._settings.in_flight:
                cache.release(running.popleft())
            if digest in cache:
                hits += 1
                hit_bytes += nbytes
            else:
                cost += Lrfu.FIXED_BYTES + nbytes
                while not cache.reserve(digest, nbytes, ()):  # as a scheduler would: wait for one to end
                    cache.release(running.popleft())
                cache.insert(Sized(digest, nbytes))  # type: ignore[arg-type]
            cache.acquire(digest)
            running.append(digest)
        count = len(trace.requests)
        total = int(trace.sizes[trace.requests].sum())
        cache.check_integrity()
        return {"hit_rate": hits / count, "byte_hit_rate": hit_bytes / total, "cost_bytes": cost / count}
