"""Divergences: full-vocabulary KL between what two sequences' distributions were, whatever the schedule did."""

import pytest
import torch

from harness import Driver, Outcome, World, make_world, random_ids, request
from loraplex.engine.kept_logits import KeptLogits, divergence
from loraplex.engine.messages import EngineRequest, TokenLogprobs
from loraplex.engine.sampling_params import SamplingParams
from loraplex.engine.sequence import Sequence
from oracle import Oracle

PROMPT, TEXT = random_ids(37, seed=1), random_ids(21, seed=2)
FIRST = len(PROMPT) - 1  # the position whose logits are about the text's first token
SCHEDULES = [{}, {"max_num_batched_tokens": 12}, {"max_num_batched_tokens": 12, "num_blocks": 24, "max_num_seqs": 3}]


@pytest.fixture(scope="module")
def world() -> World:
    world = make_world("llama")
    world.add_adapters([4, 2])
    return world


def score(seq_id: str, tokens: list[int], composition=(), first: int = FIRST, **names: str) -> EngineRequest:
    params = SamplingParams(max_tokens=0, prompt_logprobs=0, prompt_logprobs_from=first)
    return EngineRequest(seq_id=seq_id, token_ids=tuple(tokens), params=params, composition=composition, **names)


def reported(outcome: Outcome) -> list[TokenLogprobs]:
    return [one for output in outcome.outputs for one in output.prompt_logprobs]


@pytest.mark.parametrize("sizes", SCHEDULES, ids=str)
def test_a_text_is_scored_and_compared(world: World, sizes: dict):
    oracle = Oracle(world.reference, world.base.targets)
    base = oracle.logits([*PROMPT, *TEXT], []).double().log_softmax(-1)[FIRST:-1]
    with world.engine(**sizes) as engine:
        driver = Driver(engine)
        driver.add(score("base", [*PROMPT, *TEXT], keeps="b"))
        driver.run()
        for i in range(3 if sizes else 0):  # neighbours that cut its chunks and take its blocks
            driver.add(request(f"noise {i}", random_ids(20 + 7 * i, seed=50 + i), max_tokens=40))
        for digest in [None, *world.adapters]:
            driver.add(score(str(digest), [*PROMPT, *TEXT], world.use(digest), against="b"))
        outcomes = driver.run()
        engine.runner.kept_logits.check_integrity()
        assert engine.run_command("forget_logits", {"names": ["b", "nobody"]}) is None
        assert engine.runner.kept_logits.nbytes == 0
    for digest in [None, *world.adapters]:
        weights = [] if digest is None else [(world.adapters[digest], 1.0)]
        expected = oracle.logits([*PROMPT, *TEXT], weights).double().log_softmax(-1)[FIRST:-1]
        found = reported(outcomes[str(digest)])
        assert [one.token_id for one in found] == TEXT, "the text alone, every token once, in order"
        chosen = expected.gather(1, torch.tensor(TEXT).unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(torch.tensor([one.logprob for one in found]).double(), chosen, atol=1e-3, rtol=0)
        nats = (expected.exp() * (expected - base)).sum(-1)
        assert (nats.max() > 0.01) == (digest is not None)
        torch.testing.assert_close(torch.tensor([one.divergence for one in found]).double(), nats, atol=1e-3, rtol=1e-3)
    assert all(one.divergence is None for one in reported(outcomes["base"]))


def test_prompts_of_different_lengths(world: World):
    """The index counts from the first reported position."""
    other = PROMPT[5:]
    with world.engine() as engine:
        driver = Driver(engine)
        driver.add(score("base", [*PROMPT, *TEXT], keeps="b"))
        driver.run()
        driver.add(score("short", [*other, *TEXT], first=len(other) - 1, against="b"))
        driver.add(score("long", [*PROMPT, *TEXT, 5], against="b"))
        driver.add(score("nothing", [*PROMPT, *TEXT], against="c"))
        outcomes = driver.run()
    assert len(reported(outcomes["short"])) == len(TEXT)
    assert all(one.divergence is not None and one.divergence > 0 for one in reported(outcomes["short"]))
    assert [one.divergence is None for one in reported(outcomes["long"])] == [False] * len(TEXT) + [True]
    assert [one.divergence for one in reported(outcomes["nothing"])] == [None] * len(TEXT)


def test_the_prompt_before_the_text_may_come_from_the_prefix_cache(world: World):
    """And gives the same floats; where the logits of all of it are asked for, it may not."""
    with world.engine() as engine:
        driver = Driver(engine)
        driver.add(score("cold", [*PROMPT, *TEXT]))
        driver.run()
        for first in (FIRST, 9, 7, 0):
            driver.add(score(f"from {first}", [*PROMPT, *TEXT], first=first))
        outcomes = driver.run()
    size = engine.config.block_size
    assert size == 8
    cached = {name: outcome.outputs[0].num_cached_tokens for name, outcome in outcomes.items()}
    assert cached == {"cold": 0, f"from {FIRST}": FIRST // size * size, "from 9": 8, "from 7": 0, "from 0": 0}
    cold = reported(outcomes["cold"])
    for first in (FIRST, 9, 7, 0):
        found = reported(outcomes[f"from {first}"])
        assert len(found) == len(PROMPT) + len(TEXT) - 1 - first
        own = found[-len(TEXT) :]
        if world.is_batch_invariant:
            assert own == cold
        assert [one.logprob for one in own] == pytest.approx([one.logprob for one in cold], abs=1e-3)


def test_what_is_kept_first_goes_first():
    rows = torch.randn(4, 8)
    kept = KeptLogits(max_bytes=8 * rows[0].nbytes)
    found = tuple(TokenLogprobs(0, 0.0) for _ in rows)

    def see(index: int, **names: str) -> list[bool]:
        seq = Sequence(score("s", [1, 2, 3], first=0, **names), arrival=0)
        seen = kept.see(seq, index, rows, found)
        kept.check_integrity()
        return [one.divergence is not None for one in seen]

    see(0, keeps="a")
    see(0, keeps="b")
    assert see(0, against="a") == see(0, against="b") == [True] * 4
    assert see(2, against="a") == [True, True, False, False]
    see(0, keeps="c")
    assert (see(0, against="a"), see(0, against="c")) == ([False] * 4, [True] * 4)
    see(4, keeps="c")
    see(8, keeps="c")  # more than there is room for: nothing of it stays, nor what follows
    see(12, keeps="c")
    assert (see(0, against="c"), kept.nbytes) == ([False] * 4, 0)


def test_the_formula():
    p, q = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[0.25, 0.5, 0.25]]).log()
    assert divergence(p, q).item() == pytest.approx(0.5 * torch.tensor(2.0).log().item())
    assert divergence(q, p).isinf()
    assert divergence(p, p).item() == 0.0
