"""AdapterCache: the RAM tier. Counted in bytes, with leases, pins and reservations; a policy says what leaves first.

    currsize (resident) + reserved (loads under way) <= maxsize

Touched by the engine thread only, so it needs no lock. `popitem` is the one place where an adapter leaves on its own;
it passes over what is leased, pinned or protected.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

from cachetools import Cache

from loraplex.engine.adapter_ledger import AdapterLedger, Left
from loraplex.engine.eviction import EvictionPolicy, Lru

if TYPE_CHECKING:
    from loraplex.engine.messages import AdapterUse
    from loraplex.lora.weights import LoRAWeights


class AdapterCache(Cache):
    """digest -> LoRAWeights. `on_evict(digest)` is called for every adapter that leaves, for whatever reason. `policy`
    None: least recently used. `ledger` None: one of its own."""

    def __init__(
        self,
        maxsize: int,
        on_evict: Callable[[str], None] = lambda digest: None,
        policy: EvictionPolicy | None = None,
        ledger: AdapterLedger | None = None,
    ):
        super().__init__(maxsize, getsizeof=lambda weights: weights.nbytes)
        self._on_evict = on_evict
        self._policy = policy or Lru()
        self.ledger = AdapterLedger() if ledger is None else ledger
        self._wanted_by: str | None = None  # who needs the room that is being made
        self._leases: Counter[str] = Counter()
        self._pins: set[str] = set()
        self._protected: Collection[str] = ()
        self._reserved: dict[str, int] = {}
        self.num_evictions = 0

    def peek(self, digest: str) -> "LoRAWeights":
        """The adapter. KeyError when it is not resident."""
        return self[digest]

    def __setitem__(self, digest: str, weights: "LoRAWeights") -> None:
        super().__setitem__(digest, weights)
        self._policy.insert(digest, weights.nbytes)
        self.ledger.load(digest)

    def __delitem__(self, digest: str) -> None:
        super().__delitem__(digest)
        self._policy.remove(digest)

    # -- leases: uses by running sequences, and copies to the device ------------------------------------------

    def acquire(self, digest: str) -> None:
        """Lease a resident adapter: it stays until as many `release` calls. KeyError when it is not resident."""
        self.peek(digest)
        self._leases[digest] += 1
        self._policy.use(digest)
        self.ledger.begin_use(digest)

    def release(self, digest: str) -> None:
        self._unlease(digest)
        self._policy.use(digest)
        self.ledger.end_use(digest)

    def begin_copy(self, digest: str) -> None:
        """Lease a resident adapter whose slab is read by a copy. That is no use of it."""
        self.peek(digest)
        self._leases[digest] += 1

    def end_copy(self, digest: str) -> None:
        self._unlease(digest)

    def _unlease(self, digest: str) -> None:
        if self._leases[digest] < 1:
            raise ValueError(f"adapter {digest} is not leased")
        self._leases[digest] -= 1
        if not self._leases[digest]:
            del self._leases[digest]

    def num_leases(self, digest: str) -> int:
        return self._leases[digest]

    @property
    def leased(self) -> set[str]:
        return set(self._leases)

    # -- pins: the operator's wish ----------------------------------------------------------------------------

    def pin(self, digest: str) -> None:
        self._pins.add(digest)

    def unpin(self, digest: str) -> None:
        self._pins.discard(digest)

    def is_pinned(self, digest: str) -> bool:
        return digest in self._pins

    @property
    def has_pins(self) -> bool:
        return bool(self._pins)

    def can_ever_hold(self, uses: Iterable["AdapterUse"]) -> bool:
        """Whether the adapters of a composition fit into RAM together beside the pinned ones."""
        pinned = {digest for digest in self._pins if digest in self}
        needed = sum(use.nbytes for use in uses if use.digest not in pinned)
        return needed <= self.maxsize - sum(self.peek(digest).nbytes for digest in pinned)

    # -- loads ------------------------------------------------------------------------------------------------

    @property
    def reserved_bytes(self) -> int:
        return sum(self._reserved.values())

    def reserve(self, digest: str, nbytes: int, protected: Collection[str]) -> bool:
        """Set `nbytes` aside for a load, evicting what is neither in use nor `protected`; False and nothing evicted
        when that cannot be enough."""
        if not self.can_reserve(nbytes, protected):
            return False
        self._protected, self._wanted_by = protected, digest
        try:
            while nbytes > self.maxsize - self.currsize - self.reserved_bytes:
                self.popitem()
        finally:
            self._protected, self._wanted_by = (), None
        self._reserved[digest] = nbytes
        return True

    def can_reserve(self, nbytes: int, protected: Collection[str], leaving: Collection[str] = ()) -> bool:
        """Whether `reserve` would succeed, once nobody leases the adapters `leaving` any more."""
        room = self.maxsize - self.currsize - self.reserved_bytes
        for other in self:
            if room >= nbytes:
                break
            is_leased = other in self._leases and other not in leaving
            if not (is_leased or other in self._pins or other in protected):
                room += self.peek(other).nbytes
        return room >= nbytes

    def cancel_reservation(self, digest: str) -> None:
        self._reserved.pop(digest, None)

    def insert(self, weights: "LoRAWeights") -> None:
        """Make a loaded adapter resident in the room reserved for it. ValueError when it is larger than that."""
        reserved = self._reserved.pop(weights.digest, 0)
        if weights.nbytes > reserved:
            raise ValueError(f"adapter {weights.digest} has {weights.nbytes} bytes, {reserved} were reserved")
        self[weights.digest] = weights

    # -- eviction ---------------------------------------------------------------------------------------------

    def popitem(self) -> tuple[str, "LoRAWeights"]:
        """Evict the adapter of the least worth among those that may go. KeyError when none may."""
        free = (digest for digest in self if not self._is_held(digest) and digest not in self._protected)
        digest = min(free, key=self._policy.worth, default=None)
        if digest is None:
            raise KeyError("every adapter is in use, pinned or about to be used")
        weights = self.pop(digest)
        self.num_evictions += 1
        self.ledger.leave(digest, Left.ROOM, self._wanted_by)
        self._on_evict(digest)
        return digest, weights

    def evict(self, digest: str, why: Left = Left.DELETED) -> None:
        """Let one adapter go now. ValueError while it is leased."""
        if self._leases[digest]:
            raise ValueError(f"adapter {digest} is in use")
        if digest in self:
            del self[digest]
            self.ledger.leave(digest, why)
            self._on_evict(digest)

    def clear(self) -> None:
        """Let everything go that is neither leased nor pinned."""
        with suppress(KeyError):
            while True:
                self.popitem()

    def _is_held(self, digest: str) -> bool:
        return bool(self._leases.get(digest)) or digest in self._pins

    def check_integrity(self) -> None:
        assert self.currsize == sum(self.peek(digest).nbytes for digest in self), "currsize differs from the contents"
        assert self.currsize + self.reserved_bytes <= self.maxsize, "the RAM tier is over its budget"
        for digest in self._leases:
            assert digest in self, f"leased adapter {digest} is not resident"
        assert not set(self._reserved) & set(self), "a resident adapter holds a reservation"
