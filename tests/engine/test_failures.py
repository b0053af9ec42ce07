"""A step that fails ends its batch, not the server; a row that fails ends itself, not its neighbours."""

import weakref

import pytest
import torch

from harness import Driver, World, make_world, random_ids, request
from loraplex.engine import engine as engine_module
from loraplex.engine.device_errors import is_device_error, is_out_of_memory
from loraplex.engine.engine import MAX_FAILED_STEPS, EngineDied
from loraplex.engine.messages import FinishReason


@pytest.fixture(scope="module")
def world() -> World:
    world = make_world("llama")
    world.add_adapters([4, 2])
    return world


def fail_at(world: World, monkeypatch: pytest.MonkeyPatch, steps: set[int], error: Exception | None = None) -> None:
    """Make the forward pass of the given calls raise, after the base has run: blocks are half written by then."""
    forward = world.runner.forward
    calls = iter(range(10_000))

    def failing(batch, merged=None):
        result = forward(batch, merged)
        if next(calls) in steps:
            raise error or RuntimeError("injected")
        return result

    monkeypatch.setattr(world.runner, "forward", failing)


def test_a_failed_step_ends_its_batch_and_the_engine_goes_on(world: World, monkeypatch: pytest.MonkeyPatch):
    digest = next(iter(world.adapters))
    with world.engine(max_num_seqs=2) as engine:
        fail_at(world, monkeypatch, {3})
        driver = Driver(engine)
        for i in range(4):
            driver.add(request(str(i), random_ids(20, seed=i), world.use(digest if i % 2 else None)))
        outcomes = driver.run()
        reasons = [outcomes[str(i)].finish_reason for i in range(4)]
        assert reasons.count(FinishReason.ERROR) == 2, "the batch of the failed step, and nobody else"
        assert reasons.count(FinishReason.LENGTH) == 2
        failed = next(o for o in outcomes.values() if o.finish_reason is FinishReason.ERROR).outputs[-1].failure
        assert failed is not None
        assert failed.code == "engine_step_failed"
        assert "RuntimeError: injected" in failed.message
        assert engine.last_error is not None
        assert "injected" in engine.last_error


def test_nothing_of_a_failed_step_is_reused(world: World, monkeypatch: pytest.MonkeyPatch):
    """Blocks that a failed step wrote are not offered as a prefix: the next equal prompt computes them again."""
    prompt = random_ids(40, seed=3)
    with world.engine() as engine:
        driver = Driver(engine)
        driver.add(request("right", prompt))
        driver.run()
    with world.engine() as engine:
        fail_at(world, monkeypatch, {0})
        driver = Driver(engine)
        driver.add(request("failed", prompt))
        driver.add(request("other", random_ids(9, seed=4)))
        driver.run()
        driver.add(request("again", prompt))
        again = driver.run()["again"]
        assert again.outputs[0].num_cached_tokens == 0
    with world.engine() as engine:
        fresh = Driver(engine)
        fresh.add(request("right", prompt))
        assert fresh.run()["right"].tokens == again.tokens


def test_three_failed_steps_in_a_row_end_the_engine(world: World, monkeypatch: pytest.MonkeyPatch):
    with world.engine(max_num_seqs=1) as engine:
        fail_at(world, monkeypatch, set(range(1, 10)))
        driver = Driver(engine)
        for i in range(MAX_FAILED_STEPS + 1):
            driver.add(request(str(i), random_ids(5, seed=i)))
        with pytest.raises(EngineDied, match="3 steps in a row"):
            driver.run()


def test_a_good_step_in_between_forgives(world: World, monkeypatch: pytest.MonkeyPatch):
    with world.engine(max_num_seqs=1) as engine:
        fail_at(world, monkeypatch, {0, 1, 3, 4, 6})
        driver = Driver(engine)
        for i in range(8):
            driver.add(request(str(i), random_ids(5, seed=i), max_tokens=2))
        outcomes = driver.run()
    assert sum(o.finish_reason is FinishReason.LENGTH for o in outcomes.values()) == 8 - 5


def test_broken_bookkeeping_ends_the_engine(world: World, monkeypatch: pytest.MonkeyPatch):
    with world.engine() as engine:
        fail_at(world, monkeypatch, {1})
        driver = Driver(engine, check=False)
        driver.add(request("a", random_ids(5, seed=1)))
        driver.step()
        engine.blocks._ref_counts[5] += 1
        with pytest.raises(EngineDied, match="bookkeeping"):
            driver.run()
        engine.blocks._ref_counts[5] -= 1


def test_a_device_error_ends_the_engine_and_out_of_memory_does_not():
    assert is_device_error(torch.AcceleratorError("an illegal memory access", 700))
    assert not is_device_error(torch.cuda.OutOfMemoryError("too much"))
    assert not is_device_error(RuntimeError("anything"))
    refused = torch.AcceleratorError("out of memory", 2)
    refused.error_code = 2  # as torch sets it when CUDA says so
    for error in (refused, torch.OutOfMemoryError("too much")):
        assert is_out_of_memory(error)
        assert not is_device_error(error)
    assert not is_out_of_memory(torch.AcceleratorError("an illegal memory access", 700))


def test_out_of_memory_ends_the_batch_frees_what_it_held_and_names_the_flag(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    """What torch keeps is given back once the failed step's own tensors are gone; the next step runs."""
    forward = world.runner.forward
    held: list[weakref.ref] = []
    freed: list[bool] = []
    fails = {2, 3, 5}

    def failing(batch, merged=None, calls=iter(range(10_000))):  # noqa: B008  one counter for all calls
        activations = torch.ones(1000)
        if next(calls) in fails:
            held.append(weakref.ref(activations))
            try:
                activations.view(7)
            except RuntimeError as error:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB") from error
        return forward(batch, merged)

    monkeypatch.setattr(world.runner, "forward", failing)
    monkeypatch.setattr(engine_module, "free_cached_memory", lambda device: freed.append(held[-1]() is None))
    with world.engine(max_num_seqs=1) as engine:
        driver = Driver(engine)
        for i in range(6):
            driver.add(request(str(i), random_ids(5, seed=i), max_tokens=2))
        outcomes = driver.run()
    assert freed == [True] * 3
    failed = [o.outputs[-1].failure for o in outcomes.values() if o.finish_reason is FinishReason.ERROR]
    assert [failure is not None and failure.code for failure in failed] == ["insufficient_memory"] * 3
    assert all(failure and "--gpu-memory-utilization" in failure.message for failure in failed)
    assert sum(o.finish_reason is FinishReason.LENGTH for o in outcomes.values()) == 3
    assert engine.last_error is not None
    assert "Tried to allocate" in engine.last_error


def test_three_steps_out_of_memory_in_a_row_end_the_engine(world: World, monkeypatch: pytest.MonkeyPatch):
    with world.engine(max_num_seqs=1) as engine:
        fail_at(world, monkeypatch, set(range(10)), torch.OutOfMemoryError("too much"))
        driver = Driver(engine)
        for i in range(MAX_FAILED_STEPS):
            driver.add(request(str(i), random_ids(5, seed=i)))
        with pytest.raises(EngineDied, match="3 steps in a row"):
            driver.run()


def test_an_adapter_that_gives_nan_ends_only_its_own_row(world: World):
    """The values are finite, the product is not: the row that uses it gets an error, its neighbours their tokens."""
    from dataclasses import replace

    good, bad = list(world.adapters)
    poisoned = replace(world.adapters[bad], slab=torch.full_like(world.adapters[bad].slab, 3e38))
    with world.engine() as engine:
        driver = Driver(engine)
        for name, digest in (("good", good), ("base", None)):
            driver.add(request(name, random_ids(9, seed=7), world.use(digest)))
        alone = {name: outcome.tokens for name, outcome in driver.run().items()}
    with world.engine(lambda digest: poisoned if digest == bad else world.adapters[digest]) as engine:
        driver = Driver(engine)
        for name, digest in (("good", good), ("bad", bad), ("base", None)):
            driver.add(request(name, random_ids(9, seed=7), world.use(digest)))
        outcomes = driver.run()
    assert outcomes["bad"].finish_reason is FinishReason.ERROR
    failure = outcomes["bad"].outputs[-1].failure
    assert failure is not None
    assert failure.code == "non_finite_logits"
    assert {name: outcomes[name].tokens for name in ("good", "base")} == alone


def test_refusals_of_the_engine(world: World):
    with world.engine(max_waiting=2) as engine:
        driver = Driver(engine)
        driver.add(request("empty", []))
        driver.add(request("long", random_ids(190, seed=1), max_tokens=8))
        codes = {name: outcome.outputs[0].failure for name, outcome in driver.outcomes.items()}
        assert codes["empty"] is not None
        assert codes["empty"].code == "invalid_request"
        assert codes["long"] is not None
        assert codes["long"].code == "context_length_exceeded"
        for i in range(3):
            driver.add(request(str(i), [5, 6, 7]))
        last = driver.outcomes["2"].outputs[0].failure
        assert last is not None
        assert last.code == "overloaded"
        driver.run()
        with pytest.raises(ValueError, match="no command"):
            engine.run_command("dance", {})


def test_abort_at_any_moment(world: World):
    """Waiting, in the middle of a prompt, decoding, finished, unknown."""
    with world.engine(max_num_seqs=2, max_num_batched_tokens=8, max_waiting=8) as engine:
        driver = Driver(engine)
        for i in range(4):
            driver.add(request(str(i), random_ids(30, seed=i), max_tokens=4))
        driver.abort("3")
        driver.step()
        driver.abort("0")
        driver.abort("0")
        driver.abort("nobody")
        outcomes = driver.run()
        driver.abort("1")
        assert not outcomes["3"].outputs
        assert not outcomes["0"].tokens
        assert [len(outcomes[name].tokens) for name in "12"] == [4, 4]
        assert engine.blocks.num_free_blocks == engine.config.num_blocks


@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.5,)])
def test_an_adapter_with_gains_is_refused_in_a_composition_and_at_a_scale(world: World, scales: tuple[float, ...]):
    """A gain acts on the base's whole product. The request is refused by itself; its neighbours get their tokens."""
    plain = next(iter(world.adapters))
    [gained] = world.add_adapters([3], first_seed=50, has_vectors=True)
    names = (gained, plain)[: len(scales)]
    composition = tuple(use for name, scale in zip(names, scales, strict=True) for use in world.use(name, scale))
    with world.engine() as engine:
        driver = Driver(engine)
        driver.add(request("sum", random_ids(9, seed=1), composition))
        driver.add(request("alone", random_ids(9, seed=1), world.use(gained)))
        driver.add(request("plain", random_ids(9, seed=1), world.use(plain)))
        outcomes = driver.run()
        assert engine.last_error is None
    del world.adapters[gained]
    failure = outcomes["sum"].outputs[-1].failure
    assert failure is not None
    assert failure.code == "invalid_request"
    assert "DoRA" in failure.message
    assert [outcomes[name].finish_reason for name in ("alone", "plain")] == [FinishReason.LENGTH] * 2
