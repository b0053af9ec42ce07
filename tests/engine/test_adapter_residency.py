"""What is asked of RAM and device beside requests, step by step on a clock that a test moves."""

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import NoReturn

import pytest

from harness import Driver, World, make_world, random_ids, request
from loraplex.engine.adapter_residency import AdapterResidency
from loraplex.engine.engine import Engine
from loraplex.engine.messages import Failure


@pytest.fixture(scope="module")
def world() -> World:
    world = make_world("llama")
    world.add_adapters([2, 2])
    return world


@pytest.fixture
def clock() -> SimpleNamespace:
    return SimpleNamespace(now=0.0)


@pytest.fixture
def engine(world: World, clock: SimpleNamespace) -> Iterator[Engine]:
    with world.engine(max_loras=1) as engine:
        engine.residency = AdapterResidency(
            engine.cache, engine.places, world.runner.pool, engine.scheduler, lambda: clock.now
        )
        yield engine


def test_a_wish_for_a_place_waits_until_its_deadline(world: World, engine: Engine, clock: SimpleNamespace):
    """Also when the adapter is in RAM already, and requests keep every place."""
    running, wished = world.adapters
    driver = Driver(engine)
    driver.add(request("a", random_ids(4, seed=1), world.use(running), max_tokens=150))
    engine.residency.add(1, world.use(wished)[0], "device", timeout=30)
    while wished not in engine.cache or not driver.outcomes["a"].tokens:
        driver.step()
    assert not engine.step().answers
    clock.now = 31.0
    (answer,) = engine.step().answers
    assert answer.command_id == 1
    assert isinstance(answer.value, Failure)
    assert answer.value.code == "overloaded"
    assert "place on the device" in answer.value.message
    driver.abort("a")


def test_a_place_that_is_given_up_in_time_is_taken(world: World, engine: Engine, clock: SimpleNamespace):
    running, wished = world.adapters
    driver = Driver(engine)
    driver.add(request("a", random_ids(4, seed=1), world.use(running), max_tokens=150))
    engine.residency.add(1, world.use(wished)[0], "device", timeout=30)
    while wished not in engine.cache or not driver.outcomes["a"].tokens:
        driver.step()
    clock.now = 29.0
    driver.abort("a")
    (answer,) = engine.step().answers
    assert answer.value is None
    assert wished in engine.places


def test_a_load_that_nobody_waits_for_any_more_fails_nobody_else(
    world: World, engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    wanted, _ = world.adapters
    let_go = threading.Event()

    def unreadable(digest: str, on_files: object) -> NoReturn:
        assert let_go.wait(30)
        raise OSError("the disk stumbles once")

    with monkeypatch.context() as patch:
        patch.setattr(engine.loads, "_read", unreadable)
        engine.add(request("a", random_ids(4, seed=1), world.use(wanted), max_tokens=4))
        engine.step()  # the load begins
        engine.abort("a")
        assert not engine.has_work
        let_go.set()
        finished = engine.loads._finished
        finished.put(finished.get(timeout=30))  # when it has ended
    assert engine.has_work
    engine.step()
    assert not engine.has_work
    assert not engine.scheduler.loading
    engine.residency.add(1, world.use(wanted)[0], "ram", timeout=30)
    answers = []
    while not answers:
        answers = engine.step().answers
    assert answers[0].value is None
    assert wanted in engine.cache
