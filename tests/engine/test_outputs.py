"""What comes out of the engine: prompt logprobs, max_tokens 0, choices and seeds, whatever the schedule did."""

import pytest
import torch

from harness import EOS, Driver, Outcome, World, make_world, random_ids, request
from loraplex.engine.messages import FinishReason
from oracle import Oracle

SCHEDULES = [
    {},
    {"max_num_batched_tokens": 12},
    {"max_num_batched_tokens": 12, "num_blocks": 24, "fairness_quantum": 3, "max_num_seqs": 4},
]


@pytest.fixture(scope="module")
def world() -> World:
    world = make_world("llama")
    world.add_adapters([4, 2, 3])
    return world


def disturb(driver: Driver, world: World) -> None:
    """Neighbours that cut its chunks and take its blocks."""
    for i, digest in enumerate([None, *world.adapters]):
        driver.add(request(f"noise {i}", random_ids(20 + 7 * i, seed=50 + i), world.use(digest), max_tokens=40))


def reported(outcome: Outcome) -> list:
    return [logprob for output in outcome.outputs for logprob in output.prompt_logprobs]


@pytest.mark.parametrize("sizes", SCHEDULES, ids=str)
@pytest.mark.parametrize("max_tokens", [0, 1, 6])
def test_prompt_logprobs_equal_the_oracle(world: World, sizes: dict, max_tokens: int):
    digest = next(iter(world.adapters))
    prompt = random_ids(45, seed=3)
    with world.engine(**sizes) as engine:
        driver = Driver(engine)
        driver.add(request("warm", prompt, world.use(digest), max_tokens=1))
        driver.run()
        if sizes:
            disturb(driver, world)
            for _ in range(6):
                driver.step()
        driver.add(request("echo", prompt, world.use(digest), max_tokens=max_tokens, prompt_logprobs=3, logprobs=2))
        outcome = driver.run()["echo"]
        if "num_blocks" in sizes:
            assert engine.stats().num_preemptions > 0
    assert outcome.finish_reason is FinishReason.LENGTH
    assert len(outcome.tokens) == max_tokens
    assert outcome.outputs[-1].num_cached_tokens == 0, "it reads nothing from the prefix cache"
    oracle = Oracle(world.reference, world.base.targets)
    expected = oracle.logits([*prompt, *outcome.tokens], [(world.adapters[digest], 1.0)]).double().log_softmax(-1)
    found = reported(outcome)
    assert [logprob.token_id for logprob in found] == prompt[1:], "every prompt token but the first, once, in order"
    found += [output.logprobs for output in outcome.outputs if output.logprobs is not None]
    assert len(found) == 44 + max_tokens
    for position, logprob in enumerate(found):
        row = expected[position]
        count = 3 if position < 44 else 2
        assert logprob.logprob == pytest.approx(float(row[logprob.token_id]), abs=2e-3)
        assert [value for _, value in logprob.top] == pytest.approx(row.topk(count).values.tolist(), abs=2e-3)
        assert dict(logprob.top).get(logprob.token_id, logprob.logprob) == logprob.logprob


def test_prompt_logprobs_are_the_same_floats_in_any_schedule(world: World):
    prompt = random_ids(45, seed=3)
    results = []
    for sizes in SCHEDULES:
        with world.engine(**sizes) as engine:
            driver = Driver(engine)
            disturb(driver, world)
            driver.add(request("echo", prompt, max_tokens=2, prompt_logprobs=2))
            results.append(reported(driver.run()["echo"]))
    if world.is_batch_invariant:
        assert results[0] == results[1] == results[2]
    else:
        values = torch.tensor([[logprob.logprob for logprob in result] for result in results])
        assert (values - values[0]).abs().max() < 1e-3


def test_max_tokens_zero_without_logprobs_is_an_answer_without_tokens(world: World):
    with world.engine() as engine:
        driver = Driver(engine)
        driver.add(request("one", [5], max_tokens=0))
        driver.add(request("full", random_ids(192, seed=1), max_tokens=0))
        outcomes = driver.run()
    assert all(outcome.finish_reason is FinishReason.LENGTH for outcome in outcomes.values())
    assert all(not outcome.tokens for outcome in outcomes.values())


def test_choices_of_one_prompt_differ_and_repeat(world: World):
    digest = next(iter(world.adapters))
    prompt = random_ids(20, seed=4)

    def run(**sizes) -> list[list[int]]:
        with world.engine(**sizes) as engine:
            driver = Driver(engine)
            if sizes:
                disturb(driver, world)
            for choice in range(6):
                driver.add(
                    request(
                        f"c{choice}", prompt, world.use(digest), choice=choice, temperature=2.5, seed=11, max_tokens=12
                    )
                )
            outcomes = driver.run()
            if "num_blocks" in sizes:
                assert engine.stats().num_preemptions > 0
            return [outcomes[f"c{choice}"].tokens for choice in range(6)]

    choices = run()
    assert len({tuple(tokens) for tokens in choices}) == 6
    assert run(**SCHEDULES[2]) == choices, "a preempted one goes on with the same tokens"


def test_ends(world: World):
    """A stop id, an EOS, an EOS that is ignored, min_tokens before either."""
    prompt = random_ids(9, seed=5)
    towards_end = {"logit_bias": ((EOS, 100.0),), "ignore_eos": False, "max_tokens": 6}
    with world.engine() as engine:
        driver = Driver(engine)
        driver.add(request("eos", prompt, **towards_end))
        driver.add(request("ignored", prompt, **{**towards_end, "ignore_eos": True}))
        driver.add(request("later", prompt, **towards_end, min_tokens=3))
        driver.add(request("stop", prompt, logit_bias=((7, 100.0),), stop_token_ids=frozenset({7}), max_tokens=6))
        outcomes = driver.run()
    assert {name: len(outcome.tokens) for name, outcome in outcomes.items()} == {
        "eos": 1,
        "ignored": 6,
        "later": 4,
        "stop": 1,
    }
    assert [outcomes[name].outputs[-1].stop_reason for name in ("eos", "later", "stop")] == [None, None, 7]
    assert outcomes["ignored"].finish_reason is FinishReason.LENGTH
    assert EOS not in outcomes["later"].tokens[:3]


def test_pool_that_fails_to_load_leaves_no_adapter_behind(world: World, monkeypatch: pytest.MonkeyPatch):
    """When a step dies while it fills a place, the next request of that adapter must not run as the base."""
    digest = next(iter(world.adapters))
    prompt = random_ids(9, seed=6)
    with world.engine() as engine:
        driver = Driver(engine)
        driver.add(request("right", prompt, world.use(digest)))
        right = driver.run()["right"].tokens
    with world.engine() as engine:
        load, calls = type(world.runner.pool).load, iter(range(100))

        def failing(pool, place, weights):
            pool.clear(place)
            if next(calls) == 0:
                raise RuntimeError("injected: no memory for a slab")
            load(pool, place, weights)

        monkeypatch.setattr(type(world.runner.pool), "load", failing)
        driver = Driver(engine)
        driver.add(request("failed", prompt, world.use(digest)))
        assert driver.run()["failed"].finish_reason is FinishReason.ERROR
        driver.add(request("again", prompt, world.use(digest)))
        assert driver.run()["again"].tokens == right
