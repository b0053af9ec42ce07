"""Random orders of all that users, operators, disks and the time do to the three tiers.

A server (the real service on a tiny base) and a neighbour, which is another process on the same store and registry.
"""

import shutil
from collections import Counter
from collections.abc import Coroutine
from contextlib import ExitStack, aclosing, suppress
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule
from three_tiers import MAX_TOKENS, POISON, PROMPTS, TTL, bench, use, write
from tiers_invariants import Neighbour, Tiers, Work, digests
from tiers_model import Ref

from loraplex.engine.sampling_params import SamplingParams
from loraplex.errors import (
    AdapterConflict,
    AdapterLoadFailed,
    AdapterQuarantined,
    InvalidRequest,
    LoraplexError,
    ModelNotFound,
    Overloaded,
    StorageFull,
)
from loraplex.lora.digest import WEIGHTS_NAME
from loraplex.lora.steps import STEPS
from loraplex.serving.generation_request import GenerationRequest
from loraplex.serving.tiers import TIMEOUT

NAMES = st.sampled_from(["a", "a", "b", "b", "c"])
GOOD = st.integers(0, POISON - 1)
VERSION = st.sampled_from([None, None, None, 1, 1, 2, 3])
REFS = st.tuples(NAMES, VERSION)
SECONDS = st.sampled_from([0.0, 0.0, 0.0, 0.0, 1.0, 20.0, TIMEOUT + 1, TTL])
REFUSING = [step for step in STEPS if step.startswith(("stage:", "commit:")) and step != "stage: file opened"]

VERBS: dict[str, tuple[int, dict[str, st.SearchStrategy[Any]]]] = {
    "ask": (
        16,
        {
            "ref": REFS,
            "others": st.sampled_from(["", "", "a", "bc", "abc"]),
            "scale": st.sampled_from([None, None, 1.0, 0.5]),
            "prompt": st.sampled_from(PROMPTS),
            "num_tokens": st.integers(1, MAX_TOKENS),
        },
    ),
    "push": (8, {"name": NAMES, "number": st.integers(0, POISON), "is_awaited": st.booleans()}),
    "wish": (8, {"ref": REFS, "kind": st.sampled_from(["pin", "ram", "device"]), "is_awaited": st.booleans()}),
    "unpin": (3, {"ref": REFS}),
    "delete": (2, {"ref": REFS}),
    "roll_back": (3, {"name": NAMES, "to": VERSION}),
    "quarantine": (1, {"number": GOOD}),
    "cancel": (4, {"at": st.integers(0, 7)}),
    "step": (12, {"count": st.integers(1, 12), "waits": st.booleans()}),
    "finish_load": (10, {"fails": st.sampled_from([False, False, False, False, True])}),
    "keep": (5, {"seconds": SECONDS}),
    "refuse": (1, {"step": st.sampled_from(REFUSING), "at_neighbour": st.booleans()}),
    "damage": (1, {"number": GOOD, "is_lost": st.booleans()}),
    "sweep": (2, {"at_neighbour": st.booleans()}),
    "restart": (1, {"is_crash": st.booleans()}),
    "hold": (2, {"number": GOOD}),
    "end_hold": (2, {}),
    "begin_upload": (4, {"number": GOOD}),
    "end_upload": (4, {"name": NAMES, "is_accepted": st.booleans()}),
    "change": (2, {"ref": REFS, "verb": st.sampled_from(["delete", "rollback", "rollback"])}),
    "neighbour_dies": (1, {}),
}
"""What may happen, how often beside the others, and to what. One rule draws among them: as rules of their own,
hypothesis would leave half of them out of every run."""


def operation(verb: str) -> st.SearchStrategy[tuple[str, dict[str, Any]]]:
    return st.tuples(st.just(verb), st.fixed_dictionaries(VERBS[verb][1]))


OPERATIONS = st.sampled_from([verb for verb, (weight, _) in VERBS.items() for _ in range(weight)]).flatmap(operation)


class TiersMachine(Tiers):
    @initialize(numbers=st.lists(GOOD, min_size=3, max_size=6))
    def publish(self, numbers: list[int]) -> None:
        """So that there is something to ask for from the start."""
        for number, name in zip(numbers, "abcaab", strict=False):
            self.begin_upload(number)
            self.end_upload(name, True)

    @rule(operation=OPERATIONS)
    def do(self, operation: tuple[str, dict[str, Any]]) -> None:
        verb, arguments = operation
        self.evicted.clear()
        self.meant.clear()
        getattr(self, verb)(**arguments)
        self.reap()  # what came to its end while the verb took steps

    # -- the server's verbs -----------------------------------------------------------------------------------

    def begin(self, doing: Coroutine[Any, Any, None], work: Work, *, is_awaited: bool) -> None:
        async def watched() -> None:
            try:
                await doing
            except LoraplexError as error:
                work.error = error
                self.check_error(work)

        work.task = self.loop.create_task(watched())
        # seen, or asyncio would tell of it when the garbage is collected: in the midst of whatever runs then
        work.task.add_done_callback(lambda task: task.cancelled() or task.exception())
        self.works.append(work)
        self.server.settle()
        for _ in range(2000):
            if work.task.done() or not is_awaited:
                break
            self.server.advance()
        self.reap()

    def push(self, name: str, number: int, is_awaited: bool) -> None:
        work = self.work("upload", number)

        async def upload() -> None:
            done = await self.server.upload(name, number)
            assert number != POISON, "what gives NaN was accepted"
            self.tell("push", name, number)
            assert done.version.version == self.model.names[name].current
            if not work.is_hurt:
                self.damaged.discard(number)

        self.begin(upload(), work, is_awaited=is_awaited)

    def ask(self, ref: Ref, others: str, scale: float | None, prompt: tuple[int, ...], num_tokens: int) -> None:
        """For each of the adapters by itself, or for the sum of the first with each of the others."""
        if scale is None or not others:
            for one in (ref, *((name, None) for name in others)):
                self.ask_for([one], 1.0, prompt, num_tokens)
        else:
            for name in others:
                self.ask_for([ref, (name, None)], scale, prompt, num_tokens)

    def ask_for(self, refs: list[Ref], scale: float, prompt: tuple[int, ...], num_tokens: int) -> None:
        found = [self.model.resolve(ref) for ref in refs]
        refused = next((one for one in found if not isinstance(one, tuple)), None)
        numbers = [one[1] for one in found if isinstance(one, tuple)]
        scales = Counter()
        for index, number in enumerate(numbers):
            scales[number] += 1.0 if index else scale
        expected = tuple(sorted((use(n, s) for n, s in scales.items()), key=lambda one: one.digest))
        work = self.work("ask", *numbers)
        model = "+".join(of_ref(ref) + ("" if index or scale == 1 else f":{scale}") for index, ref in enumerate(refs))
        params = SamplingParams(temperature=0.0, ignore_eos=True, logprobs=0)
        wanted = GenerationRequest(model=model, prompts=[prompt], max_tokens=num_tokens, params=params)

        async def ask() -> None:
            generation = await self.server.service.generate(wanted)
            work.composition = generation.requests[0].composition
            assert refused is None, f"{model} answers"
            assert work.composition == expected, "a name means something else"
            if len(refs) == 1 and scale == 1:
                assert generation.model == f"{refs[0][0]}@{found[0][0]}"
            async with aclosing(generation.deltas()) as deltas:
                async for delta in deltas:
                    work.tokens += [token.token_id for token in delta.tokens]
            assert work.tokens == bench().tokens(expected, prompt)[:num_tokens], "another adapter answered"

        self.begin(ask(), work, is_awaited=False)
        if work.error is None:
            assert refused is None
        elif not work.composition and not isinstance(work.error, Overloaded | AdapterLoadFailed):
            assert refused is type(work.error), f"{model}: {work.error}"

    def wish(self, ref: Ref, kind: str, is_awaited: bool) -> None:
        found = self.model.resolve(ref)
        work = self.work(kind, *([found[1]] if isinstance(found, tuple) else []))
        tiers = self.server.service.tiers
        work.ref, work.found = ref, found
        self.has_pinned |= kind == "pin"

        async def wish() -> None:
            if kind != "pin":
                version = await tiers.prefetch(*ref, to=kind)  # type: ignore[arg-type]
                places = self.server.engine.places
                # several wishes may be fulfilled in one step, and the next turns the last out, of RAM or its place
                assert version.digest in {*self.server.engine.cache, *self.evicted}
                is_full = len(places) == places.num_places
                assert kind == "ram" or version.digest in places or is_full or self.evicted
            else:
                version = await tiers.pin(*ref, who="me")
                self.tell("pin", ref)
                self.kept.add(version.digest)
            assert isinstance(found, tuple)
            assert version.version == found[0] or bench().content_of[version.digest] in work.later

        self.begin(wish(), work, is_awaited=is_awaited)
        if isinstance(work.error, ModelNotFound | AdapterQuarantined):
            assert found is type(work.error)

    def unpin(self, ref: Ref) -> None:
        wanted = {pin for pin in self.model.pins if pin[0] == ref[0] and ref[1] in (None, pin[1])}
        self.tell("unpin", wanted)
        try:
            gone = self.server.finish(self.server.service.tiers.unpin(*ref, who="me"))
        except (InvalidRequest, ModelNotFound):
            assert not wanted
        else:
            assert {(pin.name, pin.version) for pin in gone} == wanted

    def delete(self, ref: Ref) -> None:
        before = self.model.contents
        self.tell("delete", *ref)
        try:
            deleted = self.server.finish(self.server.service.delete_adapter(*ref, who="me"))
        except ModelNotFound:
            assert before == self.model.contents
            return
        engine = self.server.engine
        for digest in {version.digest for version in deleted} - digests(self.model.contents):
            assert digest not in engine.cache or engine.cache.num_leases(digest)

    def roll_back(self, name: str, to: int | None) -> None:
        self.tell("rollback", name, to)
        try:
            change = self.server.finish(self.server.service.rollback_adapter(name, to, who="me"))
            assert change.version.version == self.model.names[name].current
        except (ModelNotFound, AdapterConflict, AdapterQuarantined):
            pass  # that it changed nothing is looked at after every step

    def quarantine(self, number: int) -> None:
        self.tell("quarantine", number)
        self.server.catalog.quarantine(bench().contents[number].digest, "it was asked for")

    def cancel(self, at: int) -> None:
        if not self.works:
            return
        work = self.works[at % len(self.works)]
        self.let_go(work)
        self.server.settle()
        self.reap()
        assert work not in self.works

    # -- the engine and the time ------------------------------------------------------------------------------

    def step(self, count: int, waits: bool = False) -> None:
        for _ in range(count):
            if waits:
                self.server.advance()
            else:
                self.server.step()
        self.reap()
        late = [
            work for work in self.works if work.kind in ("ram", "device") and self.clock.now > work.started + TIMEOUT
        ]
        assert not late, "a wish waits beyond its deadline"

    def finish_load(self, fails: bool) -> None:
        self.server.fails_next = fails
        self.server.finish_load()

    def keep(self, seconds: float) -> None:
        """What the server does every few seconds."""
        self.clock.now += seconds
        server, cache = self.server, self.server.engine.cache
        started, num_bad = self.clock.now, len(server.bad_loads)
        self.meant.append(digests(self.model.wanted))
        server.finish(server.service.tiers._keep_pins())
        pinned = set(server.engine.residency.pinned)
        half_way = digests({number for work in self.works if work.kind == "pin" for number in work.needed})
        assert pinned <= self.strays.union(half_way, *self.meant)
        room = cache.maxsize - server.engine.residency.pinned_bytes
        largest = max(content.nbytes for content in bench().contents)
        for digest in set.intersection(*self.meant) - pinned:
            content = bench().contents[bench().content_of[digest]]
            is_late = self.clock.now >= started + TIMEOUT
            is_bad = digest in server.bad_loads[num_bad:] or bench().content_of[digest] in self.damaged
            assert is_late or is_bad or content.nbytes + largest > room, "a pin is not kept"
        self.kept = pinned
        self.reap()
        self.expire()

    def expire(self) -> None:
        engine, now = self.server.engine, self.clock.now
        waiting = {digest for seq in engine.scheduler.waiting for digest in seq.digests}
        wishes = [work for work in self.works if work.ref is not None]
        wanted = digests({number for work in wishes if not work.later for number in work.numbers})
        perhaps = digests({number for work in wishes if work.later for number in work.needed})
        held = {digest for digest in engine.cache if engine.cache.num_leases(digest) or engine.cache.is_pinned(digest)}
        idle = {digest for digest in engine.cache if now - self.last_use[digest] >= TTL} - held - waiting - wanted
        gone = set(self.server.finish(self.server.client.command("expire", seconds=TTL)))
        assert idle - self.strays - perhaps <= gone <= idle
        assert not gone & set(engine.cache)

    # -- the disk ---------------------------------------------------------------------------------------------

    def refuse(self, step: str, at_neighbour: bool) -> None:
        (self.neighbour if at_neighbour else self.server).disk.refusing = step

    def damage(self, number: int, is_lost: bool) -> None:
        blob = self.server.store.path(bench().contents[number].digest)
        if blob.exists():
            if is_lost:
                shutil.rmtree(blob)
            else:
                (blob / WEIGHTS_NAME).write_bytes(b"damaged")
            self.damaged.add(number)
            for work in self.works:
                work.is_hurt |= number in work.numbers

    def sweep(self, at_neighbour: bool) -> None:
        at = self.neighbour if at_neighbour else self.server
        registry = self.neighbour.registry if at_neighbour else self.server.catalog.registry
        at.store.sweep(registry.live_digests)
        assert at.store.digests() <= digests(self.model.contents | self.in_use), "orphans after the sweep"

    def restart(self, is_crash: bool) -> None:
        if is_crash:
            self.dead.append((self.server, self.works))
        else:
            for work in self.works:
                self.let_go(work)
            self.server.settle()
            assert all(work.task is not None and work.task.done() for work in self.works)
        self.works = []
        self.server.close(is_crash=is_crash)
        self.start()
        assert not self.server.engine.cache
        living = (self.server.store._process, self.neighbour.store._process)
        assert all(path.name.startswith(living) for path in (self.folder / "data" / "staging").iterdir())

    # -- the neighbour ----------------------------------------------------------------------------------------

    def hold(self, number: int) -> None:
        digest = bench().contents[number].digest
        try:
            self.neighbour.store.acquire(digest)
        except AdapterLoadFailed:
            assert number in self.damaged or number not in self.model.contents, "a version without files"
        else:
            self.neighbour.held.append(digest)

    def end_hold(self) -> None:
        if self.neighbour.held:
            self.neighbour.store.release(self.neighbour.held.pop())

    def begin_upload(self, number: int) -> None:
        with ExitStack() as stack:
            try:
                staging = stack.enter_context(self.neighbour.store.stage())
                write(staging, number)
                self.neighbour.store.commit(staging)
            except StorageFull:
                return
            self.damaged.discard(number)
            self.neighbour.uploads.append((stack.pop_all(), staging, number))

    def end_upload(self, name: str, is_accepted: bool) -> None:
        if not self.neighbour.uploads:
            return
        stack, _, number = self.neighbour.uploads.pop()
        with stack:
            if is_accepted:
                self.neighbour.publish(name, number)
                self.tell("push", name, number)

    def change(self, ref: Ref, verb: str) -> None:
        self.tell(verb, *ref)
        with suppress(ModelNotFound, AdapterConflict, AdapterQuarantined):
            getattr(self.neighbour.registry, verb)(*ref, who="me")

    def neighbour_dies(self) -> None:
        """Nothing is tidied up while somebody keeps it in mind."""
        self.neighbour.close()
        self.dead_neighbours.append(self.neighbour)
        self.neighbour = Neighbour(self.folder / "data")


def of_ref(ref: Ref) -> str:
    name, version = ref
    return name if version is None else f"{name}@{version}"
