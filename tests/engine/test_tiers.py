"""Three tiers in one run: more adapters than RAM holds, more in RAM than the device holds, slow and broken disks."""

import threading
import time

import pytest

from harness import Driver, Outcome, World, make_world, random_ids, request
from loraplex.engine.messages import FinishReason
from loraplex.errors import AdapterLoadFailed

NUM_ADAPTERS, IN_RAM, PLACES = 40, 5, 3
QUANTUM = 4


@pytest.fixture(scope="module")
def world() -> World:
    world = make_world("llama")
    world.add_adapters([2 + i % 3 for i in range(NUM_ADAPTERS)])
    return world


@pytest.fixture(scope="module")
def alone(world: World) -> dict[str, list[int]]:
    """The tokens of every adapter's request when it runs by itself."""
    with world.engine() as engine:
        driver = Driver(engine)
        for i, digest in enumerate(world.adapters):
            driver.add(request(digest, random_ids(12, seed=i), world.use(digest), max_tokens=6))
            driver.run()
        return {digest: driver.outcomes[digest].tokens for digest in world.adapters}


def small(world: World) -> dict[str, int]:
    """Sizes with room for IN_RAM adapters in RAM and PLACES on the device."""
    largest = max(weights.nbytes for weights in world.adapters.values())
    return {"adapter_cache_bytes": IN_RAM * largest, "max_loras": PLACES, "fairness_quantum": QUANTUM}


def test_forty_adapters_through_five_in_ram_and_three_places(world: World, alone: dict[str, list[int]]):
    with world.engine(**small(world)) as engine:
        driver = Driver(engine)
        for i, digest in enumerate(world.adapters):
            driver.add(request(digest, random_ids(12, seed=i), world.use(digest), max_tokens=6))
        outcomes = driver.run()
        assert {digest: outcomes[digest].tokens for digest in world.adapters} == alone
        stats = engine.stats()
    assert stats.num_loads >= NUM_ADAPTERS
    assert stats.num_ram_evictions >= NUM_ADAPTERS - IN_RAM
    assert stats.load_seconds["disk"].count == stats.load_seconds["convert"].count == stats.num_loads
    assert stats.load_seconds["copy"].count >= NUM_ADAPTERS
    assert stats.max_distinct_adapters == PLACES
    assert stats.ram_bytes <= stats.ram_budget


def test_single_flight(world: World):
    """Many requests for one cold adapter read it once."""
    reads: list[str] = []

    def read(digest: str):
        reads.append(digest)
        return world.adapters[digest]

    digest = next(iter(world.adapters))
    with world.engine(read) as engine:
        driver = Driver(engine)
        for i in range(8):
            driver.add(request(str(i), random_ids(5 + i, seed=i), world.use(digest)))
        driver.run()
    assert reads == [digest]


def test_a_slow_load_stops_nobody(world: World):
    """While one adapter's load takes as long as it likes, other streams get a token in every step."""
    slow, fast = list(world.adapters)[:2]
    release = threading.Event()

    def read(digest: str):
        if digest == slow:
            assert release.wait(60)
        return world.adapters[digest]

    with world.engine(read, **small(world)) as engine:
        driver = Driver(engine)
        driver.add(request("slow", random_ids(9, seed=1), world.use(slow)))
        driver.add(request("base", random_ids(9, seed=2), max_tokens=60))
        driver.add(request("fast", random_ids(9, seed=3), world.use(fast), max_tokens=60))
        outcomes = driver.outcomes
        while any(outcomes[name].finish_reason is None for name in ("base", "fast")):
            driver.step()
        assert not outcomes["slow"].tokens
        for name in ("base", "fast"):
            assert max_gap(outcomes[name]) == 1, "a stream missed a step while another adapter was loading"
        release.set()
        driver.run()
    assert outcomes["slow"].finish_reason is FinishReason.LENGTH


def test_a_load_of_two_seconds_costs_no_stream_two_steps(world: World):
    """The same on the clock: the longest gap of other streams stays under two steps' time, far under the load's."""
    slow, fast = list(world.adapters)[2:4]

    def read(digest: str):
        if digest == slow:
            time.sleep(2.0)
        return world.adapters[digest]

    with world.engine(read, **small(world), max_model_len=192, num_blocks=96) as engine:
        driver = Driver(engine, check=False)
        driver.add(request("fast", random_ids(9, seed=3), world.use(fast), max_tokens=150))
        while not driver.outcomes["fast"].tokens:
            driver.step()
        driver.add(request("slow", random_ids(9, seed=1), world.use(slow)))
        gaps = []
        while driver.outcomes["fast"].finish_reason is None:
            began = time.monotonic()
            driver.step()
            gaps.append(time.monotonic() - began)
        driver.run()
    assert max_gap(driver.outcomes["fast"]) == 1
    assert max(gaps) < 1.8, "a step waited for the load"


def test_a_failed_load_ends_only_its_adapters_requests(world: World, alone: dict[str, list[int]]):
    broken, *others = list(world.adapters)[:6]

    def read(digest: str):
        if digest == broken:
            raise AdapterLoadFailed("the files no longer have the recorded SHA-256")
        return world.adapters[digest]

    with world.engine(read, **small(world)) as engine:
        driver = Driver(engine)
        for i, digest in enumerate((broken, *others)):
            driver.add(request(digest, random_ids(12, seed=i), world.use(digest), max_tokens=6))
        driver.add(request("second", random_ids(4, seed=9), world.use(broken)))
        driver.add(request("base", random_ids(4, seed=9)))
        outcomes = driver.run()
        for name in (broken, "second"):
            failure = outcomes[name].outputs[-1].failure
            assert failure is not None
            assert failure.code == "adapter_load_failed"
            assert "SHA-256" in failure.message
        assert {digest: outcomes[digest].tokens for digest in others} == {d: alone[d] for d in others}
        assert outcomes["base"].finish_reason is FinishReason.LENGTH
        # The next request tries again: a repaired file is served.
        driver.add(request("again", random_ids(4, seed=9), world.use(broken)))
        assert driver.run()["again"].finish_reason is FinishReason.ERROR


def test_an_unexpected_error_in_a_load_is_an_answer(world: World):
    digest = next(iter(world.adapters))

    def read(_: str):
        raise ZeroDivisionError("surprise")

    with world.engine(read) as engine:
        driver = Driver(engine)
        driver.add(request("a", [5, 6], world.use(digest)))
        failure = driver.run()["a"].outputs[-1].failure
    assert failure is not None
    assert "ZeroDivisionError: surprise" in failure.message


def test_an_adapter_larger_than_its_record_is_refused(world: World):
    """Room is reserved by the registry's figure; a slab that is larger cannot break the budget."""
    small_digest, large_digest = sorted(world.adapters, key=lambda d: world.adapters[d].nbytes)[:: NUM_ADAPTERS - 1]
    from dataclasses import replace

    def read(digest: str):
        return replace(world.adapters[large_digest], digest=digest)

    with world.engine(read) as engine:
        driver = Driver(engine)
        driver.add(request("a", [5, 6], world.use(small_digest)))
        assert driver.run()["a"].finish_reason is FinishReason.ERROR


def test_what_can_never_fit_is_refused_at_once(world: World):
    digest = next(iter(world.adapters))
    with world.engine(adapter_cache_bytes=world.adapters[digest].nbytes - 1) as engine:
        driver = Driver(engine)
        driver.add(request("a", [5, 6], world.use(digest)))
        failure = driver.outcomes["a"].outputs[0].failure
    assert failure is not None
    assert failure.code == "adapter_too_large"
    assert "--adapter-cache-bytes" in failure.message


@pytest.mark.parametrize("num_seqs", [12, 4])
def test_a_flood_on_three_adapters_starves_nobody(world: World, num_seqs: int):
    """Three adapters keep every place busy for ever. Each of the other 37 gets its first token within the bound that
    the scheduler states, (W // P + 2) quanta with W adapters ahead of it and P places, and one step for each load."""
    flood, others = list(world.adapters)[:3], list(world.adapters)[3:]
    bound = ((len(others) - 1) // PLACES + 2) * QUANTUM + NUM_ADAPTERS
    with world.engine(**small(world), max_num_seqs=num_seqs) as engine:
        driver = Driver(engine, check=False)
        count = 0

        def top_up() -> None:
            nonlocal count
            while count - sum(driver.outcomes[f"f{i}"].finish_reason is not None for i in range(count)) < 48:
                prompt = random_ids(8, seed=count)
                driver.add(request(f"f{count}", prompt, world.use(flood[count % 3]), max_tokens=40))
                count += 1

        top_up()
        for _ in range(20):
            driver.step()
        arrival = engine.scheduler.step
        for digest in others:
            driver.add(request(digest, random_ids(12, seed=1), world.use(digest), max_tokens=4))
        while any(driver.outcomes[digest].finish_reason is None for digest in others):
            top_up()
            step = engine.scheduler.step
            driver.step()
            if engine.is_stalled:  # waiting for the disk is not the scheduler's time
                engine.scheduler.step = step
            assert engine.scheduler.step - arrival < 4 * bound, "somebody starves"
        engine.check_integrity()
        first = {digest: driver.outcomes[digest].steps[0] - arrival for digest in others}
        for i in range(count):
            driver.abort(f"f{i}")
    assert max(first.values()) <= bound, f"first tokens after {sorted(first.values())[-3:]} steps, bound {bound}"


def max_gap(outcome: Outcome) -> int:
    """Steps between neighbouring tokens."""
    return max(b - a for a, b in zip(outcome.steps, outcome.steps[1:], strict=False))
