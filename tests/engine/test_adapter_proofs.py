"""Proofs beside requests: they take what nobody needs, end in time, and leave nothing behind."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from harness import Driver, World, make_world, random_ids, request
from loraplex.engine import adapter_proofs
from loraplex.engine.adapter_proofs import BUSY_SHARE
from loraplex.engine.engine import Engine
from loraplex.engine.messages import Command, CommandResult, FinishReason
from loraplex.engine.proof_result import ProofResult
from loraplex.errors import AdapterLoadFailed


@pytest.fixture(scope="module")
def world() -> World:
    world = make_world("llama")
    world.add_adapters([4, 2, 8])
    return world


class Proving(Driver):
    """A driver that keeps the answers of commands."""

    def __init__(self, engine: Engine):
        super().__init__(engine)
        engine.proofs.prepare()
        self.answers: dict[int, CommandResult] = {}
        step = engine.step

        def noted():
            output = step()
            for answer in output.answers:
                self.answers[answer.command_id] = answer
            return output

        engine.step = noted  # type: ignore[method-assign]

    def prove(self, number: int, use: tuple, timeout: float = 60.0) -> None:
        assert self.engine.take(Command(number, "prove", {"use": use[0], "timeout": timeout})) is None

    def result(self, number: int) -> ProofResult:
        return self.answers[number].value


def test_an_idle_engine_proves(world: World):
    with world.engine() as engine:
        driver = Proving(engine)
        for number, digest in enumerate(world.adapters):
            driver.prove(number, world.use(digest))
        driver.run()
        assert [driver.result(number).failure for number in range(3)] == [None] * 3
        assert set(engine.cache) == set(world.adapters), "warm, since it was sent to be used"
        assert not engine.places.digests
        assert not engine.cache.leased
        assert not engine.has_work


def test_requests_do_not_notice(world: World):
    """Tokens and logits of requests, some of them for the very adapter, are the same beside proofs."""
    digests = list(world.adapters)

    def run(driver: Driver, prove: Callable[[int], None]) -> dict[str, dict[int, torch.Tensor]]:
        for i in range(6):
            driver.add(request(str(i), random_ids(12 + i, seed=i), world.use([None, *digests][i % 4])))
        for step in range(200):
            if step % 3 == 0 and step < 9:
                prove(step // 3)
            if driver.engine.has_work:
                driver.step()
        assert not driver.engine.has_work
        assert all(outcome.finish_reason is FinishReason.LENGTH for outcome in driver.outcomes.values())
        return world.runner.recorded

    with world.engine() as engine:
        alone = run(Driver(engine), lambda number: None)
    with world.engine() as engine:
        driver = Proving(engine)
        beside = run(driver, lambda number: driver.prove(number, world.use(digests[number])))
        assert [driver.result(number).failure for number in range(3)] == [None] * 3
    assert alone.keys() == beside.keys()
    for name, rows in alone.items():
        assert all(torch.equal(rows[at], beside[name][at]) for at in rows), name


class Clock:
    """Time that passes only in steps and slices."""

    def __init__(self) -> None:
        self.now = 0.0
        self.module = SimpleNamespace(perf_counter=lambda: self.now, monotonic=lambda: self.now)

    def slowed(self, function: Callable, seconds: float) -> Callable:
        def run(*args, **kwargs):
            self.now += seconds
            return function(*args, **kwargs)

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Steps take 8 s; a slice takes 3."""
    clock = Clock()
    monkeypatch.setattr(adapter_proofs, "time", clock.module)
    monkeypatch.setattr("loraplex.engine.engine.time", clock.module)
    advance = adapter_proofs.AdapterProofs._advance
    monkeypatch.setattr(adapter_proofs.AdapterProofs, "_advance", clock.slowed(advance, 3.0))
    return clock


def test_a_busy_engine_gives_it_a_share_of_the_time(world: World, clock: Clock, monkeypatch: pytest.MonkeyPatch):
    digest = next(iter(world.adapters))
    with world.engine() as engine:
        monkeypatch.setattr(world.runner, "execute", clock.slowed(world.runner.execute, 8.0))
        driver = Proving(engine)
        driver.add(request("a", random_ids(4, seed=1), max_tokens=100))
        driver.step()
        driver.prove(1, world.use(digest), timeout=10_000)
        started, num_tokens = clock.now, len(driver.outcomes["a"].tokens)
        longest = 0.0
        while 1 not in driver.answers:
            before = clock.now
            driver.step()
            longest = max(longest, clock.now - before)
        steps = len(driver.outcomes["a"].tokens) - num_tokens
        spent = clock.now - started - 8.0 * steps
        assert longest == 8.0 + 3.0, "one slice a step at most"
        assert spent <= BUSY_SHARE * 8.0 * steps + 3.0
        assert driver.result(1).failure is None
        driver.run()


def test_a_proof_that_takes_too_long_is_no_proof(world: World, clock: Clock):
    digest = next(iter(world.adapters))
    with world.engine() as engine:
        driver = Proving(engine)
        driver.prove(1, world.use(digest), timeout=20)
        driver.prove(2, world.use(digest), timeout=1000)
        driver.run()
        failure = driver.result(1).failure
        assert failure is not None
        assert failure.code == "proof_timeout"
        assert "within 20 s" in failure.message
        assert "--proof-timeout" in failure.message
        assert driver.result(2).failure is None, "its time counts from its turn"
        assert world.runner.pool.digest_in(world.runner.probe_place) is None


def test_room_that_is_in_use_is_waited_for(world: World):
    """RAM for one adapter: a running one keeps it, and the proof comes after."""
    first, second = list(world.adapters)[:2]
    room = max(world.adapters[digest].nbytes for digest in (first, second))
    with world.engine(adapter_cache_bytes=room) as engine:
        driver = Proving(engine)
        driver.add(request("a", random_ids(4, seed=1), world.use(first), max_tokens=20))
        while not engine.cache.leased:
            driver.step()
        driver.prove(1, world.use(second))
        driver.run()
        assert len(driver.outcomes["a"].tokens) == 20
        assert driver.result(1).failure is None


def test_room_that_a_waiting_request_needs_is_left(world: World):
    """The adapter of a queued request is not evicted for a proof."""
    first, second, third = world.adapters
    sizes = {digest: weights.nbytes for digest, weights in world.adapters.items()}
    with world.engine(adapter_cache_bytes=sizes[first] + sizes[third], max_num_seqs=1) as engine:
        driver = Proving(engine)
        driver.add(request("a", random_ids(4, seed=1), world.use(first), max_tokens=12))
        driver.add(request("b", random_ids(4, seed=1), world.use(third), max_tokens=4))
        while third not in engine.cache:
            driver.step()
        driver.prove(1, world.use(second))
        driver.run()
        assert engine.stats().num_ram_evictions <= 1
        assert driver.result(1).failure is None


def test_what_is_too_large_beside_pins_is_refused_at_once(world: World):
    first, second = list(world.adapters)[:2]
    with world.engine(adapter_cache_bytes=world.adapters[first].nbytes) as engine:
        driver = Proving(engine)
        driver.prove(1, world.use(first))
        driver.run()
        engine.cache.pin(first)
        driver.prove(2, world.use(second))
        driver.run()
        failure = driver.result(2).failure
        assert failure is not None
        assert failure.code == "adapter_too_large"
        engine.cache.unpin(first)


def test_files_that_cannot_be_read(world: World):
    def read(digest: str):
        raise AdapterLoadFailed("The disk is gone. Bring it back.")

    with world.engine(read) as engine:
        driver = Proving(engine)
        driver.prove(1, world.use(next(iter(world.adapters))))
        driver.run()
        failure = driver.result(1).failure
        assert failure is not None
        assert (failure.code, failure.message) == ("adapter_load_failed", "The disk is gone. Bring it back.")


def test_an_adapter_that_fails_leaves_ram(world: World):
    from dataclasses import replace

    digest = next(iter(world.adapters))
    empty = replace(world.adapters[digest], slab=torch.zeros_like(world.adapters[digest].slab))
    with world.engine(lambda _: empty) as engine:
        driver = Proving(engine)
        driver.prove(1, world.use(digest))
        driver.run()
        assert driver.result(1).failure is not None
        assert digest not in engine.cache


def test_a_proof_that_breaks_ends_itself(world: World, monkeypatch: pytest.MonkeyPatch):
    """Whatever is raised in it: the request beside it gets its tokens."""
    digest = next(iter(world.adapters))

    def broken(*args):
        raise RuntimeError("injected")

    monkeypatch.setattr("loraplex.engine.adapter_proof.AdapterProof._delta", broken)
    with world.engine() as engine:
        driver = Proving(engine)
        driver.add(request("a", random_ids(4, seed=1), max_tokens=8))
        driver.prove(1, world.use(digest))
        driver.run()
        failure = driver.result(1).failure
        assert failure is not None
        assert failure.code == "engine_step_failed"
        assert "injected" in (engine.last_error or "")
        assert len(driver.outcomes["a"].tokens) == 8
        assert world.runner.pool.digest_in(world.runner.probe_place) is None
