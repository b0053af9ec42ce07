"""AdapterLedger: what is known of adapters beside their weights: how often and when they were used, why they left RAM.

Touched by the engine thread only. Of more than MEMORY adapters those that were heard of least lately are forgotten.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from cachetools import LRUCache


class Left(StrEnum):
    """Why an adapter left RAM."""

    ROOM = "room"  # to make room for another
    IDLE = "idle"  # nobody used it for so long as --adapter-ttl says
    DELETED = "deleted"  # no version is made of it any more
    REFUSED = "refused"  # its proof failed


@dataclass(slots=True)
class Entry:
    """`uses`: leases so far. All times are on the ledger's clock, in seconds; None: never."""

    uses: int = 0
    loads: int = 0
    last_use: float | None = None
    loaded_at: float | None = None
    left_at: float | None = None
    left: Left | None = None
    left_for: str | None = None  # the digest that needed the room


class AdapterLedger:
    MEMORY = 10_000

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._entries: LRUCache[str, Entry] = LRUCache(self.MEMORY)

    def __iter__(self):
        return iter(self._entries)

    def load(self, digest: str) -> None:
        """It is resident now."""
        entry = self._of(digest)
        entry.loads += 1
        entry.loaded_at = self._clock()

    def begin_use(self, digest: str) -> None:
        """A lease on it begins."""
        entry = self._of(digest)
        entry.uses += 1
        entry.last_use = self._clock()

    def end_use(self, digest: str) -> None:
        self._of(digest).last_use = self._clock()

    def leave(self, digest: str, why: Left, wanted_by: str | None = None) -> None:
        """It is not resident any more."""
        entry = self._of(digest)
        entry.left_at, entry.left, entry.left_for = self._clock(), why, wanted_by

    def look(self, digest: str) -> Entry:
        """What is known of it; an empty entry for a stranger."""
        return self._entries.get(digest) or Entry()

    def ago(self, moment: float | None) -> float | None:
        """Seconds since `moment`."""
        return None if moment is None else max(0.0, self._clock() - moment)

    def idle_seconds(self, digest: str) -> float:
        """Since the resident `digest` was last used, or loaded if that was later."""
        entry = self.look(digest)
        moments = [moment for moment in (entry.last_use, entry.loaded_at) if moment is not None]
        return self._clock() - max(moments) if moments else 0.0

    def _of(self, digest: str) -> Entry:
        if digest not in self._entries:
            self._entries[digest] = Entry()
        return self._entries[digest]
