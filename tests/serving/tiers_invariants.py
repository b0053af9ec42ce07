"""What must be true of the three tiers after every operation of `tiers_machine`, and what is under way meanwhile."""

import asyncio
import shutil
import tempfile
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hypothesis.stateful import RuleBasedStateMachine, invariant
from three_tiers import POISON, SEQUENCES, WAITING, Clock, Disk, Inline, Server, bench
from tiers_model import Ref, TiersModel, number_of

from loraplex.engine.messages import Composition
from loraplex.errors import (
    AdapterInvalid,
    AdapterLoadFailed,
    AdapterQuarantined,
    AdapterTooLarge,
    InsufficientMemory,
    LoraplexError,
    ModelNotFound,
    Overloaded,
    ProofTimedOut,
    StorageFull,
)
from loraplex.lora.digest import CONFIG_NAME, WEIGHTS_NAME
from loraplex.lora.registry import Registry
from loraplex.lora.staging import Staging
from loraplex.lora.store import AdapterStore
from loraplex.serving.tiers import TIMEOUT


class Neighbour:
    """Another process on the same folder and database: an upload under way has its blob, and is no version yet."""

    def __init__(self, root: Path):
        self.disk = Disk()
        self.store = AdapterStore(root, step=self.disk)
        self.registry = Registry(f"sqlite:///{root.parent / 'registry.sqlite'}", bench().info.fingerprint)
        self.held: list[str] = []
        self.uploads: list[tuple[ExitStack, Staging, int]] = []

    def publish(self, name: str, number: int) -> None:
        content = bench().contents[number]
        self.registry.publish(name, content.digest, content.facts, source="upload", who="me")

    def close(self) -> None:
        self.registry.close()
        self.store.close()


@dataclass(eq=False)
class Work:
    """A verb that the server has under way. `numbers`: the contents that it is about, as far as that is known."""

    kind: str  # "ask", "upload", "pin", "ram", "device"
    started: float
    num_bad: int  # loads that had failed before
    num_refused: int
    numbers: frozenset[int] = frozenset()
    ref: Ref | None = None  # of a wish; `found`: what it meant at first
    found: Any = None
    later: set[int] = field(default_factory=set)  # what it came to mean meanwhile: the wish may turn to it
    composition: Composition = ()
    tokens: list[int] = field(default_factory=list)
    error: LoraplexError | None = None
    is_hurt: bool = False  # the disk damaged a content of its while it ran
    is_cancelled: bool = False
    task: asyncio.Task[None] | None = None

    @property
    def needed(self) -> set[int]:
        return self.numbers | self.later


class Tiers(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        bench()
        self.folder = Path(tempfile.mkdtemp(prefix="loraplex-machine-"))
        self.loop = asyncio.new_event_loop()

        self.loop.set_default_executor(Inline(1))
        self.clock = Clock()
        self.model = TiersModel()
        self.damaged: set[int] = set()  # or lost, perhaps
        self.works: list[Work] = []
        self.dead: list[tuple[Server, list[Work]]] = []  # what they had under way, too
        self.dead_neighbours: list[Neighbour] = []
        self.has_pinned = False
        self.start()
        self.neighbour = Neighbour(self.folder / "data")

    def start(self) -> None:
        self.kept: set[str] = set()  # digests that are pinned in RAM, and were wanted all the time since
        self.meant: list[set[str]] = []  # what the pins came to mean during the operation, digests
        self.strays: set[str] = set()  # pinned or not: whoever asked is gone
        self.last_use: dict[str, float] = {}
        self.evicted: list[str] = []  # by the operation under way
        self.server = Server(self.folder / "data", self.loop, self.clock, self._on_evict)
        cache, pins = self.server.engine.cache, self.server.catalog.registry.pins
        release, insert, drop = cache.release, cache.insert, pins.drop_deleted

        def used(digest: str) -> None:
            release(digest)
            self.last_use[digest] = self.clock.now

        def inserted(weights: Any) -> None:
            insert(weights)
            self.last_use[weights.digest] = self.clock.now

        def dropped() -> None:
            drop()
            self.model.drop_pins()

        cache.release, cache.insert, pins.drop_deleted = used, inserted, dropped  # type: ignore[method-assign]

    def tell(self, verb: str, *arguments: Any) -> None:
        """The model does it, too. What no pin means for a moment may be let go, until the pins are looked at again."""
        getattr(self.model, verb)(*arguments)
        for work in self.works:
            if work.ref is not None:
                now = self.model.resolve(work.ref)
                if isinstance(now, tuple) and now != work.found:
                    work.later.add(now[1])
        self.meant.append(digests(self.model.wanted))
        self.kept &= self.meant[-1]

    def _on_evict(self, digest: str) -> None:
        running = {one for seq in self.server.engine.scheduler.running for one in seq.digests}
        assert digest not in running, "an adapter that runs was evicted"
        wanted = {bench().contents[number].digest for number in self.model.wanted}
        assert digest not in self.kept & wanted, "a pinned adapter was evicted"
        self.kept.discard(digest)
        self.evicted.append(digest)

    def work(self, kind: str, *numbers: int) -> Work:
        server = self.server
        return Work(kind, self.clock.now, server.num_bad_told, server.disk.num_refused, frozenset(numbers))

    def reap(self) -> None:
        for work in [work for work in self.works if work.task is not None and work.task.done()]:
            self.works.remove(work)
            if not work.task.cancelled():
                work.task.result()

    def check_error(self, work: Work) -> None:
        """Nothing is refused without a reason."""
        error, one = work.error, bench()
        bad = {one.content_of[digest] for digest in self.server.bad_loads[work.num_bad :]}
        budget = int(self.server.engine.cache.maxsize)
        match error:
            case StorageFull():
                assert work.kind == "upload"
                assert self.server.disk.num_refused > work.num_refused
            case AdapterInvalid():
                assert work.numbers == {POISON}, error
            case ProofTimedOut():
                assert self.clock.now > work.started + TIMEOUT
            case AdapterTooLarge():
                assert self.has_pinned
            case AdapterLoadFailed(code="adapter_too_large"):
                assert self.has_pinned or sum(one.contents[n].nbytes for n in work.numbers) > budget
            case AdapterLoadFailed():
                assert work.needed & (bad | self.damaged), error
            case InsufficientMemory():
                pinned = self.server.engine.residency.pinned_bytes
                largest = max(content.nbytes for content in one.contents)
                assert pinned + sum(one.contents[n].nbytes for n in work.needed) + largest > budget
            case Overloaded():
                is_full = self.server.service.num_running >= SEQUENCES + WAITING
                assert is_full if work.kind == "ask" else self.clock.now > work.started + TIMEOUT
            case ModelNotFound() | AdapterQuarantined():
                assert not work.composition
            case _:
                raise AssertionError(f"{work.kind}: {error}") from error

    def let_go(self, work: Work) -> None:
        work.is_cancelled = True
        self.strays |= digests(work.needed)
        assert work.task is not None
        work.task.cancel()

    # -- what must be true ------------------------------------------------------------------------------------

    @property
    def in_use(self) -> set[int]:
        """The contents that something under way may hold on disk."""
        held = {bench().content_of[digest] for digest in self.neighbour.held}
        held |= {number for _, _, number in self.neighbour.uploads}
        return held.union(*(work.needed for work in self.works))

    @invariant()
    def what_was_accepted_is_on_disk(self) -> None:
        live = digests(self.model.contents)
        held = {*self.neighbour.held, *digests({number for _, _, number in self.neighbour.uploads})}
        held |= {one.digest for work in self.works for one in work.composition}
        for store, registry in (
            (self.server.store, self.server.catalog.registry),
            (self.neighbour.store, self.neighbour.registry),
        ):
            assert seen(registry) == expected(self.model)
            assert registry.live_digests() == live
            store.check_integrity()
        registry.check_integrity()  # there is one database
        present = self.server.store.digests()
        assert (live | held) - present <= digests(self.damaged), "the sweep took what is needed"
        needed = {bench().content_of[digest] for digest in live | held}
        broken = {number for number in needed if not is_whole(self.server.store, number)}
        assert broken <= self.damaged, "an accepted adapter cannot be read"
        pins = {(pin.name, pin.version) for pin in self.server.catalog.registry.pins.list()}
        assert pins == self.model.pins

    @invariant()
    def ram_is_counted(self) -> None:
        engine = self.server.engine
        engine.check_integrity()
        nbytes = [bench().contents[bench().content_of[digest]].nbytes for digest in engine.cache]
        assert engine.cache.currsize == sum(nbytes) <= engine.cache.maxsize
        wanted = digests(self.model.wanted)
        assert {digest for digest in self.kept & wanted if not engine.cache.is_pinned(digest)} == set()
        assert self.kept & wanted <= set(engine.cache), "a pinned adapter is not in RAM"
        leases = Counter(digest for seq in engine.scheduler.running for digest in seq.digests)
        assert {digest: engine.cache.num_leases(digest) for digest in engine.cache.leased} == leases

    @invariant()
    def the_device_holds_what_the_files_say(self) -> None:
        engine, pool = self.server.engine, self.server.engine.runner.pool
        places = {engine.places.place_of(digest): digest for digest in engine.places.digests}
        assert len(places) == len(engine.places) <= engine.places.num_places
        for place in range(engine.places.num_places):
            assert pool.digest_in(place) == places.get(place), "a place was not emptied"
        for place, digest in places.items():
            for key, tensor in bench().contents[bench().content_of[digest]].tensors.items():
                module = pool.modules[key[:-2]]
                rank = tensor.shape[0] if key.endswith("A") else tensor.shape[1]
                assert int(module.rank[place]) == rank
                start = int((module.offset_a if key.endswith("A") else module.offset_b)[place])
                flat = (tensor if key.endswith("A") else tensor.T).reshape(-1)
                slab = module.slabs[place]
                assert slab is not None
                assert torch.equal(slab[start : start + flat.numel()], flat), "the device holds other bytes"

    @invariant()
    def nothing_leaks(self) -> None:
        assert self.server.service.num_running == sum(work.kind == "ask" for work in self.works)
        if not self.works:
            assert not self.server.store._holds, "a hold on files was not returned"
            assert not self.server.engine.cache.leased, "a lease was not returned"

    def teardown(self) -> None:
        try:
            for _ in range(2000):
                if not self.works:
                    break
                self.server.advance()
                self.reap()
            assert not self.works, "something never ends"
            self.check_all()
            for digest in self.neighbour.held:
                self.neighbour.store.release(digest)
            for stack, _, _ in self.neighbour.uploads:
                stack.close()
            self.neighbour.close()
            self.server.close()
            self.start()  # whose first act is a sweep
            store = self.server.store
            assert store.digests() <= digests(self.model.contents)
            assert digests(self.model.contents) - store.digests() <= digests(self.damaged)
            assert not list((self.folder / "data" / "staging").iterdir())
            assert events(self.server.catalog.registry) == self.model.events
        finally:
            self.server.close()
            for server, works in self.dead:
                for work in works:
                    self.let_go(work)
                server.settle()
            self.loop.close()
            shutil.rmtree(self.folder)

    def check_all(self) -> None:
        self.what_was_accepted_is_on_disk()
        self.ram_is_counted()
        self.the_device_holds_what_the_files_say()
        self.nothing_leaks()


def digests(numbers: frozenset[int] | set[int]) -> set[str]:
    return {bench().contents[number].digest for number in numbers}


def seen(registry: Registry) -> dict[str, Any]:
    found: dict[str, Any] = {one.name: (one.version, {}) for one in registry.list()}
    for one in registry.pins.named(0, 1000)[0]:
        found[one.name][1][one.version] = (bench().content_of[one.digest], one.state)
    return found


def expected(model: TiersModel) -> dict[str, Any]:
    def state(name: str, version: int) -> str:
        return "quarantined" if (name, version) in model.quarantined else "ready"

    return {
        name: (one.current, {version: (number_of(of), state(name, version)) for version, of in one.ready.items()})
        for name, one in model.names.items()
        if one.ready
    }


def events(registry: Registry) -> list[Any]:
    """Without those of pins."""

    def number(meant: str | None) -> int | None:
        return None if meant is None else int(meant.partition("@")[2])

    return [
        (one.action, one.name, one.version, number(one.detail["was"]), number(one.detail["now"]))
        for one in reversed(registry.events()[0])
        if "was" in one.detail
    ]


def is_whole(store: AdapterStore, number: int) -> bool:
    content = bench().contents[number]
    blob = store.path(content.digest)
    try:
        return ((blob / CONFIG_NAME).read_bytes(), (blob / WEIGHTS_NAME).read_bytes()) == (
            content.config,
            content.weights,
        )
    except OSError:
        return False
