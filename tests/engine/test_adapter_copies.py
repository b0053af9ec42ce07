"""A whole engine whose places have memory of their own, on the CPU: copies end when the test says so, and until then
their target is not a number. So a step that met half an adapter, or one that a copy wrote into, would be seen."""

import random
from dataclasses import dataclass

import pytest
import torch

from harness import Driver, World, make_world, random_ids, request
from loraplex.engine.adapter_pool import AdapterPool
from loraplex.engine.engine import Engine
from loraplex.engine.messages import Command, FinishReason
from loraplex.lora.weights import SLAB_ALIGNMENT

RANK = 4
PLACES = 2


@dataclass(eq=False)
class ManualCopy:
    slab: torch.Tensor
    room: torch.Tensor
    num_queries: int | None = None  # after so many it ends by itself
    is_done: bool = False

    def end(self) -> None:
        self.room.copy_(self.slab)
        self.is_done = True

    def query(self) -> bool:
        if not self.is_done and self.num_queries is not None:
            self.num_queries -= 1
            if self.num_queries < 0:
                self.end()
        return self.is_done

    def synchronize(self) -> None:
        """The test says when; it does not wait."""


class ManualStream:
    """`delay()`: how often a copy is asked whether it has ended before it has; None: until the test ends it."""

    def __init__(self, delay=lambda: None):
        self.copies: list[ManualCopy] = []
        self.errors: list[Exception] = []  # raised by the next calls
        self._delay = delay

    def copy(self, slab: torch.Tensor, room: torch.Tensor) -> ManualCopy:
        if self.errors:
            raise self.errors.pop(0)
        room.fill_(torch.nan)
        self.copies.append(ManualCopy(slab, room, self._delay()))
        return self.copies[-1]

    @property
    def under_way(self) -> list[ManualCopy]:
        return [copy for copy in self.copies if not copy.is_done]


def slab_bytes(world: World, rank: int) -> int:
    linears = [shape for shape in world.base.targets.values() if shape.kind == "linear"]
    return 4 * rank * sum(shape.in_features + shape.out_features for shape in linears)


@pytest.fixture(scope="module")
def world() -> World:
    """Places hold rank `RANK` on every linear; the last adapter is larger."""
    place_bytes = slab_bytes(make_world("llama"), RANK)
    world = make_world("llama", max_loras=PLACES, place_bytes=place_bytes)
    world.add_adapters([RANK, 2, 3, 4])
    world.add_adapters([2], first_seed=50, has_vectors=True)
    world.add_adapters([RANK + 4], first_seed=60)
    return world


@pytest.fixture(scope="module")
def alone(world: World) -> dict[str | None, list[int]]:
    """Tokens of each adapter by itself, on a pool that shares the RAM tier's memory."""
    plain = make_world("llama")
    plain.adapters = world.adapters
    with plain.engine() as engine:
        driver = Driver(engine)
        for digest in (None, *plain.adapters):
            driver.add(request(str(digest), random_ids(12, seed=5), plain.use(digest), max_tokens=6))
        outcomes = driver.run()
    return {digest: outcomes[str(digest)].tokens for digest in (None, *plain.adapters)}


def step_until(driver: Driver, condition) -> None:
    for _ in range(1000):
        if condition():
            return
        driver.step()
    raise AssertionError("it does not come to that")


def ask(driver: Driver, world: World, name: str, digest: str | None, **params) -> None:
    driver.add(request(name, random_ids(12, seed=5), world.use(digest), **{"max_tokens": 6, **params}))


def test_a_request_waits_for_the_copy_and_the_others_do_not(world: World, alone: dict):
    first = next(iter(world.adapters))
    stream = ManualStream()
    with world.engine(stream=stream) as engine:
        driver = Driver(engine)
        ask(driver, world, "base", None, max_tokens=60)
        ask(driver, world, "waits", first)
        step_until(driver, lambda: stream.copies)
        for _ in range(20):
            driver.step()
        assert not driver.outcomes["waits"].outputs
        assert engine.stats().device_digests == ()
        assert engine.residency.standings([first])[0].tier == "ram"
        steps = driver.outcomes["base"].steps
        assert steps == list(range(steps[0], steps[0] + len(steps)))
        stream.copies[0].end()
        outcomes = driver.run()
        assert engine.stats().device_digests == (first,)
        assert engine.stats().load_seconds["copy"].count == 1
    assert outcomes["waits"].tokens == alone[first]
    assert outcomes["base"].tokens[:6] == alone[None]


def test_an_idle_engine_waits_for_the_copy_and_not_for_a_message(world: World, monkeypatch: pytest.MonkeyPatch):
    """It would else sleep until somebody writes, with a request at hand."""
    first = next(iter(world.adapters))
    monkeypatch.setattr(ManualCopy, "synchronize", ManualCopy.end)
    with world.engine(stream=ManualStream()) as engine:
        driver = Driver(engine)
        ask(driver, world, "a", first)
        step_until(driver, lambda: first in engine.cache or engine.places.copying)
        while not driver.outcomes["a"].tokens:
            driver.step()
            assert not engine.is_stalled
        driver.run()


def test_any_schedule_gives_the_same_tokens(world: World, alone: dict):
    """Six adapters in two places and RAM for about four, copies of any length, aborts: places are used again and again,
    RAM is evicted, and every request's tokens are those of the request alone."""
    rng = random.Random(3)
    ram = sum(sorted(w.nbytes for w in world.adapters.values())[-4:])
    stream = ManualStream(lambda: rng.randrange(5))
    names = [None, *world.adapters]
    with world.engine(stream=stream, adapter_cache_bytes=ram, max_num_seqs=3, fairness_quantum=4) as engine:
        driver = Driver(engine)
        asked: dict[str, str | None] = {}
        aborted: set[str] = set()
        for index in range(60):
            asked[str(index)] = rng.choice(names)
            ask(driver, world, str(index), asked[str(index)])
            for _ in range(rng.randrange(3)):
                driver.step()
            if rng.random() < 0.15:
                aborted.add(str(index))
                driver.abort(str(index))
        outcomes = driver.run()
        assert engine.cache.num_evictions
        assert len(stream.copies) > 20
        assert not engine.cache.leased
    for name, digest in asked.items():
        if name not in aborted:
            assert outcomes[name].tokens == alone[digest], (name, outcomes[name].outputs[-1].failure)


def test_a_copy_is_never_from_or_into_memory_in_use(world: World):
    """What a step reads is none of what a copy under way reads or writes."""
    rng = random.Random(5)
    stream = ManualStream(lambda: rng.randrange(6))
    forward = world.runner.forward

    def watched(batch, merged=None):
        pool = world.runner.pool
        for copy in stream.under_way:
            for place in range(PLACES):
                slab = pool._slabs[place]
                assert slab is None or slab.data_ptr() != copy.room.data_ptr()
        return forward(batch, merged)

    with world.engine(stream=stream, fairness_quantum=3) as engine, pytest.MonkeyPatch.context() as patch:
        patch.setattr(world.runner, "forward", watched)
        driver = Driver(engine)
        for index in range(20):
            ask(driver, world, str(index), rng.choice(list(world.adapters)))
            driver.step()
        outcomes = driver.run()
        assert engine.last_error is None
    assert all(outcome.finish_reason is FinishReason.LENGTH for outcome in outcomes.values())


def test_an_abort_while_copying(world: World):
    first = next(iter(world.adapters))
    stream = ManualStream()
    with world.engine(stream=stream) as engine:
        driver = Driver(engine)
        ask(driver, world, "a", first)
        step_until(driver, lambda: stream.copies)
        driver.abort("a")
        engine.check_integrity()
        assert engine.has_work, "the lease of the copy is to end"
        engine.take(Command(1, "evict", {"digests": [first]}))
        assert first in engine.cache, "deleted meanwhile: its slab is being read"
        stream.copies[0].end()
        driver.step()
        assert not engine.has_work
        assert engine.places.arrived == [first]
        engine.take(Command(2, "evict", {"digests": [first]}))
        assert not engine.places.digests
        assert first not in engine.cache


def test_a_copy_without_memory_fails_only_its_adapters_requests(world: World, alone: dict):
    first, second, *_ = world.adapters
    stream = ManualStream(lambda: 1)
    stream.errors = [torch.OutOfMemoryError("Tried to allocate 2.00 GiB")]
    with world.engine(stream=stream) as engine:
        driver = Driver(engine)
        ask(driver, world, "base", None)
        for name in ("a", "b"):
            ask(driver, world, name, first)
        step_until(driver, lambda: driver.outcomes["a"].finish_reason)
        ask(driver, world, "other", second)
        ask(driver, world, "again", first)
        outcomes = driver.run()
        assert engine.last_error is None
    for name in ("a", "b"):
        failure = outcomes[name].outputs[-1].failure
        assert failure is not None
        assert failure.code == "insufficient_memory"
        assert "--max-lora-rank" in failure.message
    for name, digest in (("base", None), ("other", second), ("again", first)):
        assert outcomes[name].tokens == alone[digest]


def test_what_cannot_be_entered_fails_only_its_own(world: World, monkeypatch: pytest.MonkeyPatch):
    first, second, *_ = world.adapters
    enter = AdapterPool.enter

    def failing(self, place, weights):
        if weights.digest == first:
            raise RuntimeError("surprise")
        enter(self, place, weights)

    monkeypatch.setattr(AdapterPool, "enter", failing)
    with world.engine(stream=ManualStream(lambda: 0)) as engine:
        driver = Driver(engine)
        ask(driver, world, "a", first)
        ask(driver, world, "b", second)
        outcomes = driver.run()
    failure = outcomes["a"].outputs[-1].failure
    assert failure is not None
    assert failure.code == "adapter_load_failed"
    assert "RuntimeError: surprise" in failure.message
    assert outcomes["b"].finish_reason is FinishReason.LENGTH


def test_a_lost_device_ends_the_engine(world: World):
    stream = ManualStream()
    stream.errors = [torch.AcceleratorError("an illegal memory access", 700)]
    with world.engine(stream=stream) as engine:
        driver = Driver(engine, check=False)
        ask(driver, world, "a", next(iter(world.adapters)))
        with pytest.raises(torch.AcceleratorError):
            driver.run()
        engine.places.end_copy(engine.places.digests[0])  # the books as they were, for the next test
        engine.cache.end_copy(engine.places.digests[0])
        engine.places.release(engine.places.digests[0])


def test_a_wish_for_a_place_is_fulfilled_when_the_copy_has_ended(world: World):
    first, second, *_ = world.adapters
    stream = ManualStream()
    with world.engine(stream=stream) as engine:
        bring(engine, world, first)
        answers = steps(engine, 10)
        assert stream.copies
        assert not answers
        stream.copies[0].end()
        (answer,) = steps(engine, 3)
        assert answer.value is None
        assert engine.places.arrived == [first]
        stream.errors = [torch.OutOfMemoryError("no")]
        bring(engine, world, second)
        (answer,) = steps(engine, 50)
        assert answer.value.code == "insufficient_memory"


def bring(engine: Engine, world: World, digest: str) -> None:
    engine.take(Command(1, "bring", {"use": world.use(digest)[0], "wish": "device", "timeout": 30}))


def steps(engine: Engine, count: int) -> list:
    import time

    answers = []
    for _ in range(count):
        answers += engine.step().answers
        time.sleep(0.002)
    return answers


def test_integrity_notices_a_copy_that_the_books_do_not_know(world: World):
    stream = ManualStream()
    with world.engine(stream=stream) as engine:
        driver = Driver(engine)
        ask(driver, world, "a", next(iter(world.adapters)))
        step_until(driver, lambda: stream.copies)
        engine.places._copying.clear()
        with pytest.raises(AssertionError):
            engine.check_integrity()
        engine.places._copying.update(engine.places.digests)
        stream.copies[0].end()
        driver.run()


# -- the pool's memory ----------------------------------------------------------------------------------------------


def test_a_swap_allocates_nothing(world: World):
    """An adapter lies where its place always was; one that is larger has memory of its own; one place is no other's."""
    pool = world.runner.pool
    assert pool._memory is not None
    start, size = pool._memory.data_ptr(), pool._memory.shape[1]
    assert size % SLAB_ALIGNMENT == 0
    *fitting, large = world.adapters.values()
    for weights in fitting:
        for place in range(pool.num_places):
            pool.load(place, weights)
            slab = pool._slabs[place]
            assert slab is not None
            assert slab.data_ptr() == start + place * size
            assert torch.equal(slab, weights.slab)
    pool.load(1, large)
    slab = pool._slabs[1]
    assert slab is not None
    assert not start <= slab.data_ptr() < start + pool._memory.nbytes
    assert slab.data_ptr() != large.slab.data_ptr()
    assert torch.equal(slab, large.slab)
    for place in range(pool.num_places):
        pool.clear(place)
    assert pool.nbytes == 0


def test_without_memory_of_its_own_a_place_is_an_address():
    plain = make_world("llama")
    [digest] = plain.add_adapters([2])
    plain.runner.pool.load(0, plain.adapters[digest])
    assert plain.runner.pool._slabs[0] is plain.adapters[digest].slab
