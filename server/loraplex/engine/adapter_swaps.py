"""AdapterSwaps: which adapters are being copied into which places, ahead of the sequences that need them. Bookkeeping
only, no tensors.

Where places have memory of their own, a sequence is admitted when all its adapters have arrived there; until then it
waits like one whose adapter is read from disk, and nobody waits with it. A copy leases its slab in RAM and keeps its
place from its start to its end, whether or not the sequence it was begun for still lives: both are bounded by the time
of a copy, so that what waits still holds nothing.
"""

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Protocol

from loraplex.engine.adapter_cache import AdapterCache
from loraplex.engine.adapter_places import AdapterPlaces
from loraplex.engine.waiting_queue import Line

if TYPE_CHECKING:
    from loraplex.lora.weights import LoRAWeights


class StartsCopies(Protocol):
    def start(self, place: int, weights: "LoRAWeights") -> None: ...


class AdapterSwaps:
    def __init__(self, cache: AdapterCache, places: AdapterPlaces, copies: StartsCopies, max_concurrent: int):
        self._cache = cache
        self._places = places
        self._copies = copies
        self._max_concurrent = max_concurrent

    def have_arrived(self, digests: Iterable[str]) -> bool:
        return all(map(self._places.has_arrived, digests))

    def prefetch(self, lines: Iterable[Line], step: int) -> None:
        """Look ahead over the queue in the order of service and bring what is in RAM into places that nobody uses.

        What comes earlier keeps its places: nothing that it needs makes room for something later, and nothing later
        is copied past one that finds no place, or a composition would never find all of its.
        """
        wanted: set[str] = set()
        for line in lines:
            wanted |= line.digests
            digests = line.waiting[0].digests
            if any(digest not in self._cache for digest in digests):
                continue
            num_missing = sum(digest not in self._places for digest in digests)
            num_copying = len(self._places.copying)
            if num_missing and num_copying and num_copying + num_missing > self._max_concurrent:
                return
            if not self.start(digests, wanted, step):
                return

    def start(self, digests: Collection[str], kept: Collection[str], step: int) -> bool:
        """Begin to copy those of `digests`, all in RAM, that have no place; the places of `kept` and of what is in use
        are left alone. False and nothing done when that leaves too few."""
        missing = [digest for digest in digests if digest not in self._places]
        in_use = self._cache.leased.union(digest for digest in kept if digest in self._places)
        if missing and not self._places.can_hold(digests, in_use):
            return False
        in_use.update(digests)
        for digest in missing:
            place = self._places.assign(digest, in_use, step)
            self._places.begin_copy(digest)
            self._cache.begin_copy(digest)
            self._copies.start(place, self._cache.peek(digest))
        return True

    def finish(self, digest: str, *, has_arrived: bool) -> None:
        """The copy has ended; an adapter that did not arrive gives its place back."""
        self._cache.end_copy(digest)
        self._places.end_copy(digest)
        if not has_arrived:
            self._places.release(digest)
