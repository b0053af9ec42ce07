"""Merged weights in the engine: right where they run, unseen where they do not, built and dropped between steps."""

import time
from collections.abc import Iterator

import pytest
import torch

from harness import Driver, World, make_world, random_ids, request
from loraplex.engine import adapter_merges
from loraplex.engine.adapter_merges import MergeStatus
from loraplex.engine.engine import Engine
from loraplex.engine.merge_policy import MergePolicy
from loraplex.engine.messages import Command, CommandResult
from oracle import Oracle


@pytest.fixture(scope="module")
def world() -> World:
    world = make_world("llama")
    world.add_adapters([4, 8], kinds=("linear", "head", "embedding"))
    world.add_adapters([4], ("q_proj", "down_proj"), first_seed=50)
    world.add_adapters([4], ("q_proj",), first_seed=60, has_vectors=True)
    return world


@pytest.fixture
def digests(world: World) -> list[str]:
    return list(world.adapters)


def wait_for(driver: Driver, command_id: int) -> MergeStatus:
    """Step until the command is answered."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for answer in driver.engine.step().answers:
            if answer.command_id == command_id:
                return status_of(answer)
        time.sleep(0.001)
    raise AssertionError("no answer")


def status_of(answer: CommandResult) -> MergeStatus:
    assert answer.error is None
    return answer.value


def merge(driver: Driver, world: World, digest: str, command_id: int = 1) -> MergeStatus:
    answer = driver.engine.take(Command(command_id, "merge", {"use": world.use(digest)[0]}))
    return wait_for(driver, command_id) if answer is None else status_of(answer)


@pytest.fixture
def engine(world: World) -> Iterator[Engine]:
    with world.engine(merge="manual") as engine:
        yield engine


def logits_of(world: World, engine: Engine, composition, prompt: list[int]) -> list[torch.Tensor]:
    """Of a request alone."""
    driver = Driver(engine)
    seq_id = f"r{time.perf_counter_ns()}"
    driver.add(request(seq_id, prompt, composition, max_tokens=3, prompt_logprobs=0))
    driver.run()
    assert driver.outcomes[seq_id].outputs[-1].failure is None
    rows = world.runner.recorded[seq_id]
    return [rows[position] for position in sorted(rows)]


@pytest.mark.parametrize("index", [0, 2])
def test_merged_logits_are_the_oracles(world: World, digests: list[str], engine: Engine, index: int):
    digest, prompt = digests[index], random_ids(20, seed=index)
    unmerged = logits_of(world, engine, world.use(digest), prompt)
    status = merge(Driver(engine), world, digest)
    assert (status.state, status.failure) == ("ready", None)
    assert status.nbytes > 0
    assert status.error < 1e-5, "float32 loses next to nothing"
    merged = logits_of(world, engine, world.use(digest), prompt)
    stats = engine.stats()
    assert stats.num_merged_steps == 3
    assert [s.num_steps for s in stats.merges] == [3]
    expected = Oracle(world.reference, world.base.targets).logits(prompt, [(world.adapters[digest], 1.0)])
    spread = expected.max() - expected.min()
    for position, row in enumerate(merged[: len(prompt)]):
        assert (row - expected[position]).abs().max() <= 1e-4 * spread
    assert any(not torch.equal(a, b) for a, b in zip(merged, unmerged, strict=True)), "it ran on other weights"


def test_only_steps_that_are_wholly_its_own_run_merged(world: World, digests: list[str], engine: Engine):
    first, second = digests[:2]
    prompt = random_ids(20, seed=3)
    merge(Driver(engine), world, first)
    for composition in ((), world.use(second), world.use(first, 0.5), (*world.use(first), *world.use(second, 0.5))):
        logits_of(world, engine, composition, prompt)
    assert engine.stats().num_merged_steps == 0
    driver = Driver(engine)
    driver.add(request("a", prompt, world.use(first), max_tokens=4))
    driver.add(request("b", prompt, world.use(None), max_tokens=2))
    driver.run()
    # they share two steps; the first goes on alone for two more
    assert engine.stats().num_merged_steps == 2


def test_others_and_the_base_do_not_see_it(world: World, digests: list[str], engine: Engine):
    prompt = random_ids(20, seed=4)
    compositions = [(), world.use(digests[1]), world.use(digests[0], 0.5), world.use(digests[3])]
    before = [logits_of(world, engine, composition, prompt) for composition in compositions]
    plain = logits_of(world, engine, world.use(digests[0]), prompt)
    merge(Driver(engine), world, digests[0])
    after = [logits_of(world, engine, composition, prompt) for composition in compositions]
    for one, other in zip(before, after, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    engine.take(Command(2, "unmerge", {"digest": digests[0]}))
    assert engine.stats().merges == ()
    back = logits_of(world, engine, world.use(digests[0]), prompt)
    assert all(torch.equal(a, b) for a, b in zip(plain, back, strict=True))


def test_no_lora_op_runs_in_a_merged_step(world: World, digests: list[str], engine: Engine, monkeypatch):
    merge(Driver(engine), world, digests[0])
    calls = []
    for name in ("add_lora", "shrink", "expand"):
        monkeypatch.setattr(world.runner.ops, name, lambda *arguments, name=name: calls.append(name))
    logits_of(world, engine, world.use(digests[0]), random_ids(20, seed=5))
    assert calls == []


def test_more_than_deltas_is_refused(world: World, digests: list[str], engine: Engine):
    status = merge(Driver(engine), world, digests[3])
    assert status.state == "refused"
    assert status.failure is not None
    assert status.failure.code == "not_mergeable"
    assert "DoRA" in status.failure.message
    assert not world.runner.merged
    logits_of(world, engine, world.use(digests[3]), random_ids(20, seed=5))


def test_what_does_not_fit_is_refused_with_the_figures(world: World, digests: list[str], engine: Engine, monkeypatch):
    room = int(engine.cache.maxsize) + 1000
    monkeypatch.setattr(adapter_merges, "available_memory", lambda device: room)
    status = merge(Driver(engine), world, digests[0])
    assert status.failure is not None
    assert status.failure.code == "insufficient_memory"
    assert "bytes" in status.failure.message
    assert not world.runner.merged


def test_a_merge_that_was_called_off_answers(world: World, digests: list[str], engine: Engine):
    assert engine.take(Command(7, "merge", {"use": world.use(digests[0])[0]})) is None
    assert engine.has_work
    assert engine.take(Command(8, "unmerge", {"digest": digests[0]})) == CommandResult(8, None)
    status = wait_for(Driver(engine), 7)
    assert status.failure is not None
    assert status.failure.code == "merge_cancelled"
    again = engine.take(Command(9, "unmerge", {"digest": digests[0]}))
    assert again is not None
    assert again.error is not None


def test_deleting_an_adapter_drops_its_set(world: World, digests: list[str], engine: Engine):
    merge(Driver(engine), world, digests[0])
    engine.take(Command(2, "evict", {"digests": [digests[0]]}))
    assert engine.stats().merges == ()
    assert not world.runner.merged


def test_merging_twice_answers_at_once_and_together(world: World, digests: list[str], engine: Engine):
    driver = Driver(engine)
    use = world.use(digests[0])[0]
    assert engine.take(Command(1, "merge", {"use": use})) is None
    assert engine.take(Command(2, "merge", {"use": use})) is None
    answered: set[int] = set()
    while len(answered) < 2:
        answered |= {answer.command_id for answer in engine.step().answers}
        time.sleep(0.001)
    assert merge(driver, world, digests[0], 3).state == "ready"


def run_alone(driver: Driver, world: World, digest: str, steps: int) -> None:
    driver.add(request(f"x{time.perf_counter_ns()}", random_ids(4, seed=1), world.use(digest), max_tokens=steps))
    driver.run()


def test_automatic_merging_follows_the_traffic(world: World, digests: list[str]):
    with world.engine(merge="auto") as engine:
        engine.merges._policy = MergePolicy(build_after=5, drop_after=8)
        driver = Driver(engine)
        run_alone(driver, world, digests[0], 30)
        while engine.has_work:
            driver.step()
        assert [(s.digest, s.state, s.is_automatic) for s in engine.stats().merges] == [(digests[0], "ready", True)]
        before = engine.stats().num_merged_steps
        run_alone(driver, world, digests[0], 10)
        assert engine.stats().num_merged_steps == before + 10
        run_alone(driver, world, digests[1], 30)
        while engine.has_work:
            driver.step()
        assert [s.digest for s in engine.stats().merges] == [digests[1]], "the lead has passed"
        assert set(world.runner.merged) == {digests[1]}


def test_automatic_merging_leaves_what_rounding_would_eat(digests: list[str]):
    """bfloat16 has 8 bits: of a delta of a hundredth of the weight little is left."""
    world = make_world("llama", torch.bfloat16)
    (digest,) = world.add_adapters([4], scaling=0.002)
    with world.engine(merge="auto") as engine:
        engine.merges._policy = MergePolicy(build_after=2, drop_after=8)
        driver = Driver(engine)
        run_alone(driver, world, digest, 10)
        while engine.has_work:
            driver.step()
        (status,) = engine.stats().merges
        assert status.state == "refused"
        assert status.failure is not None
        assert status.failure.code == "merge_too_coarse"
        assert f"{status.error:.1%}" in status.failure.message
        assert status.error > adapter_merges.MAX_ERROR
        run_alone(driver, world, digest, 30)
        assert engine.stats().merges == (status,), "it is not tried again and again"
        status = merge(driver, world, digest)
        assert status.state == "ready", "whoever asks for it by name gets it, with the figure"
