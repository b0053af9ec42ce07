"""Which adapter leaves RAM first: the policies of --eviction. Pure Python; they know digests and sizes only.

    lru    least recently used
    lrfu   frequency, recency and size in one number (the default; figures in bench/NOTES.md)

A policy values; it never decides alone: `AdapterCache` passes over what is leased, pinned or protected.
"""

from math import log2
from typing import Protocol

NAMES = ("lru", "lrfu")


class EvictionPolicy(Protocol):
    def insert(self, digest: str, nbytes: int) -> None:
        """`digest` is resident now; it was not."""
        ...

    def use(self, digest: str) -> None:
        """A lease on the resident `digest` begins or ends."""
        ...

    def remove(self, digest: str) -> None:
        """`digest` is not resident any more."""
        ...

    def worth(self, digest: str) -> float:
        """Of the resident `digest`: the smallest leaves first."""
        ...


def eviction_policy(name: str) -> EvictionPolicy:
    """A new one by its name. ValueError for an unknown name."""
    match name:
        case "lru":
            return Lru()
        case "lrfu":
            return Lrfu()
    raise ValueError(f"the eviction policy is one of {', '.join(NAMES)}, not {name!r}")


class Lru:
    """Least recently used."""

    def __init__(self) -> None:
        self._clock = 0
        self._last: dict[str, int] = {}

    def insert(self, digest: str, nbytes: int) -> None:
        self.use(digest)

    def use(self, digest: str) -> None:
        self._clock += 1
        self._last[digest] = self._clock

    def remove(self, digest: str) -> None:
        del self._last[digest]

    def worth(self, digest: str) -> float:
        return self._last[digest]


class Lrfu:
    """Least recently and frequently used (Lee et al., "LRFU: a spectrum of policies", IEEE ToC 2001), by the cost of a
    load for each byte it occupies, as GreedyDual-Size-Frequency does (Cherkasova 1998):

        worth = log2( sum over uses of 2^(time of the use) · cost / nbytes )    cost = FIXED_BYTES + nbytes

    Time is counted in half-lives: a use moves it on by 1 / (HALF_LIFE · residents). So a use that is a half-life older
    counts half, and worths need no ageing: all sink alike. What was evicted is remembered for MEMORY half-lives.
    """

    HALF_LIFE = 10.0
    """Uses for each resident adapter; a request is two, the beginning and the end of its lease."""
    MEMORY = 8.0
    FIXED_BYTES = 2 << 20
    """What a load costs beside its bytes: as much as reading and converting so many."""

    def __init__(self) -> None:
        self._time = 0.0
        self._uses: dict[str, float] = {}  # log2 of the sum, also of those that were evicted
        self._inserted: dict[str, float] = {}  # of residents, the time
        self._weight: dict[str, float] = {}  # of residents, log2(cost / nbytes)
        self._prune_at = 64

    def insert(self, digest: str, nbytes: int) -> None:
        self._inserted[digest] = self._time
        self._weight[digest] = log2((self.FIXED_BYTES + nbytes) / max(1, nbytes))

    def use(self, digest: str) -> None:
        self._time += 1 / (self.HALF_LIFE * max(1, len(self._weight)))
        known = self._uses.get(digest)
        self._uses[digest] = self._time if known is None else self._time + log2(1 + 2 ** (known - self._time))
        if len(self._uses) >= self._prune_at:
            self._prune()

    def remove(self, digest: str) -> None:
        del self._inserted[digest], self._weight[digest]

    def worth(self, digest: str) -> float:
        # one that was loaded ahead of its first use is worth as much as if that were the moment it came
        return max(self._uses.get(digest, float("-inf")), self._inserted[digest]) + self._weight[digest]

    @property
    def num_remembered(self) -> int:
        """Digests of which uses are known, resident or not."""
        return len(self._uses)

    def _prune(self) -> None:
        oldest = self._time - self.MEMORY
        self._uses = {d: value for d, value in self._uses.items() if value > oldest or d in self._weight}
        self._prune_at = max(64, 2 * len(self._uses))
