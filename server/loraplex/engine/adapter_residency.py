"""AdapterResidency: what is asked of RAM and device beside requests: pins, adapters brought in ahead, idle ones let go.

What is asked for takes of RAM what no request needs, and of the device a place that nobody uses; it waits until its
deadline for either. Requests go first.
"""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

from loraplex.engine.adapter_cache import AdapterCache
from loraplex.engine.adapter_copies import FinishedCopy
from loraplex.engine.adapter_ledger import Left
from loraplex.engine.adapter_loads import FinishedLoad
from loraplex.engine.adapter_places import AdapterPlaces
from loraplex.engine.adapter_pool import AdapterPool
from loraplex.engine.messages import AdapterUse, CommandResult, Failure
from loraplex.engine.scheduler import Scheduler

Wish = Literal["ram", "device", "pin"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterStanding:
    """Where an adapter stands. Picklable. `nbytes`: in RAM, 0 if it is not there; seconds are of the past, None:
    never."""

    digest: str
    tier: Literal["device", "ram", "loading", "disk"]
    nbytes: int
    leases: int
    is_pinned: bool
    uses: int
    loads: int
    seconds_since_use: float | None
    seconds_since_left: float | None
    left: str | None  # a value of `Left`
    left_for: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TiersView:
    """RAM in bytes, the device in places; `standings` of every adapter that is resident or known from before."""

    ram_bytes: int
    ram_budget: int
    pinned_bytes: int
    reserved_bytes: int  # for loads under way
    num_places: int
    num_places_used: int
    pool_bytes: int
    standings: tuple[AdapterStanding, ...]


@dataclass(slots=True)
class _Job:
    command_id: int
    use: AdapterUse
    wish: Wish
    room: int  # bytes that a pin must leave for others
    deadline: float
    failure: Failure | None = None


class AdapterResidency:
    def __init__(
        self,
        cache: AdapterCache,
        places: AdapterPlaces,
        pool: AdapterPool,
        scheduler: Scheduler,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._cache = cache
        self._places = places
        self._pool = pool
        self._scheduler = scheduler
        self._clock = clock
        self._jobs: list[_Job] = []

    def add(self, command_id: int, use: AdapterUse, wish: Wish, timeout: float, room: int = 0) -> None:
        """Bring an adapter into RAM ("ram"), to keep it there ("pin"), or on to the device ("device"), within `timeout`
        seconds. The answer, a Failure or None, comes with a later step."""
        self._jobs.append(_Job(command_id, use, wish, room, self._clock() + timeout))

    @property
    def has_work(self) -> bool:
        return bool(self._jobs)

    def finish_load(self, load: FinishedLoad) -> None:
        if load.error is not None:
            for job in self._jobs:
                if job.use.digest == load.digest:
                    job.failure = Failure(load.error.code, load.error.message)

    def finish_copy(self, copy: FinishedCopy) -> None:
        if copy.failure is not None:
            for job in self._jobs:
                if job.use.digest == copy.digest and job.wish == "device":
                    job.failure = copy.failure

    def work(self) -> list[CommandResult]:
        """The answers of those that are fulfilled or refused now."""
        answers, waiting = [], []
        for job in self._jobs:
            is_done = self._advance(job)
            if is_done or job.failure is not None:
                answers.append(CommandResult(job.command_id, job.failure))
            else:
                waiting.append(job)
        self._jobs = waiting
        return answers

    def _advance(self, job: _Job) -> bool:
        """Whether the wish is fulfilled; what cannot be has a failure then."""
        digest = job.use.digest
        job.failure = job.failure or self._refusal(job)
        if job.failure is not None:
            return False
        is_resident = digest in self._cache
        if is_resident and job.wish == "pin":
            self._cache.pin(digest)
        if is_resident and (job.wish != "device" or self._place(digest)):
            return True
        if self._clock() > job.deadline:
            where = "place on the device" if is_resident else "room in RAM"
            job.failure = Failure("overloaded", f"The adapter found no {where} beside those in use. Try again later.")
        elif not is_resident:
            self._scheduler.load(job.use)
        return False

    def _place(self, digest: str) -> bool:
        """Put a resident adapter into a place that nobody uses, if there is one; whether it stands there."""
        if self._scheduler.swaps is not None:
            awaited = {digest for line in self._scheduler.waiting.lines for digest in line.digests}
            self._scheduler.swaps.start([digest], awaited, self._scheduler.step)
        elif digest not in self._places:
            in_use = self._cache.leased
            if not self._places.can_hold([digest], in_use):
                return False
            place = self._places.assign(digest, in_use, self._scheduler.step)
            self._pool.load(place, self._cache.peek(digest))
        return self._places.has_arrived(digest)

    def _refusal(self, job: _Job) -> Failure | None:
        if job.wish == "pin" and not self._cache.is_pinned(job.use.digest):
            pinned, budget = self.pinned_bytes, int(self._cache.maxsize)
            left = budget - pinned - job.use.nbytes
            if left < job.room:
                beside = f" beside {pinned} pinned ones" if pinned else ""
                start = "Unpin another, or start" if pinned else "Start"
                return Failure(
                    "insufficient_memory",
                    f"Pinning {job.use.nbytes} bytes{beside} would leave {max(0, left)} of the "
                    f"{budget} bytes of RAM for adapters, and the largest of the others needs {job.room}: it could not "
                    f"be served any more. {start} the server with --adapter-cache-bytes "
                    f"{pinned + job.use.nbytes + job.room} or more.",
                )
        if job.use.digest not in self._cache and not self._cache.can_ever_hold([job.use]):
            return Failure(
                "insufficient_memory",
                f"The adapter needs {job.use.nbytes} bytes in RAM, and {int(self._cache.maxsize) - self.pinned_bytes} "
                f"of {int(self._cache.maxsize)} are not pinned. Unpin some, or start the server with a larger "
                "--adapter-cache-bytes.",
            )
        return None

    # -- done at once -----------------------------------------------------------------------------------------

    def unpin(self, digest: str) -> None:
        """Let the policy decide about it again."""
        self._cache.unpin(digest)

    @property
    def pinned(self) -> tuple[str, ...]:
        return tuple(digest for digest in self._cache if self._cache.is_pinned(digest))

    @property
    def pinned_bytes(self) -> int:
        return sum(self._cache.peek(digest).nbytes for digest in self.pinned)

    def expire(self, seconds: float) -> tuple[str, ...]:
        """Let the adapters go from RAM that nobody used for so long; those that are pinned, leased or waited for
        stay. Returns their digests."""
        awaited = {digest for line in self._scheduler.waiting.lines for digest in line.digests}
        awaited |= {job.use.digest for job in self._jobs}
        ledger = self._cache.ledger
        idle = [digest for digest in self._cache if ledger.idle_seconds(digest) >= seconds and digest not in awaited]
        gone = tuple(d for d in idle if not (self._cache.num_leases(d) or self._cache.is_pinned(d)))
        for digest in gone:
            self._cache.evict(digest, Left.IDLE)
        return gone

    def view(self) -> TiersView:
        known = dict.fromkeys([*self._cache, *self._scheduler.loading, *self._cache.ledger])
        return TiersView(
            ram_bytes=int(self._cache.currsize),
            ram_budget=int(self._cache.maxsize),
            pinned_bytes=self.pinned_bytes,
            reserved_bytes=self._cache.reserved_bytes,
            num_places=self._places.num_places,
            num_places_used=len(self._places),
            pool_bytes=self._pool.nbytes,
            standings=self.standings(known),
        )

    def standings(self, digests: Collection[str]) -> tuple[AdapterStanding, ...]:
        """Of each of `digests`, also of those that were never heard of."""
        return tuple(map(self._standing, digests))

    def _standing(self, digest: str) -> AdapterStanding:
        ledger = self._cache.ledger
        entry = ledger.look(digest)
        is_resident = digest in self._cache
        return AdapterStanding(
            digest=digest,
            tier="device"
            if self._places.has_arrived(digest)
            else "ram"
            if is_resident
            else "loading"
            if digest in self._scheduler.loading
            else "disk",
            nbytes=self._cache.peek(digest).nbytes if is_resident else 0,
            leases=self._cache.num_leases(digest),
            is_pinned=self._cache.is_pinned(digest),
            uses=entry.uses,
            loads=entry.loads,
            seconds_since_use=ledger.ago(entry.last_use),
            seconds_since_left=ledger.ago(entry.left_at),
            left=entry.left,
            left_for=entry.left_for,
        )
