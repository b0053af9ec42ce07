"""Mixed traffic while sets of merged weights come and go: nothing is lost, and nobody's logits leave their bounds."""

import random
from dataclasses import replace

import pytest
import torch

from harness import Driver, World, make_world, random_ids, request
from loraplex.engine.merge_policy import MergePolicy
from loraplex.engine.messages import EngineRequest

NUM_ADAPTERS, NUM_TEMPLATES = 4, 40
TOLERANCE = 1e-4
"""Of the logits' range: float32, where merging rounds once more in the last bits."""


@pytest.fixture(scope="module")
def world() -> World:
    world = make_world("llama")
    world.add_adapters([2, 4, 8, 4])
    return world


def make_templates(world: World) -> list[EngineRequest]:
    digests = list(world.adapters)
    templates = []
    for i in range(NUM_TEMPLATES):
        use = world.use(None if i % 5 == 4 else digests[i % 5])
        templates.append(request(f"t{i}", random_ids(3 + i % 13, seed=i), use, max_tokens=1 + i % 6))
    return templates


Alone = dict[str, tuple[list[int], dict[int, torch.Tensor]]]


def run_alone(world: World, templates: list[EngineRequest]) -> Alone:
    alone: Alone = {}
    for template in templates:
        with world.engine() as engine:
            driver = Driver(engine)
            driver.add(template)
            driver.run()
            rows = dict(world.runner.recorded[template.seq_id])
            alone[template.seq_id] = (driver.outcomes[template.seq_id].tokens, rows)
    return alone


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_traffic_under_automatic_merging(world: World, count: int):
    """The traffic changes its mind: now one adapter's alone, now everybody's."""
    templates = make_templates(world)
    alone = run_alone(world, templates)
    rng = random.Random(count)
    with world.engine(merge="auto") as engine:
        engine.merges._policy = policy = MergePolicy(build_after=3, drop_after=6)
        driver = Driver(engine, check=False)
        sent = installed = 0
        was: set[str] = set()
        last_digest: str | None = None
        while sent < count or engine.has_work:
            if sent < count and len(engine.scheduler.running) + len(engine.scheduler.waiting) < 8:
                if sent % 25 == 0:
                    policy._drops.clear()  # its patience would end the switching that is tested here
                    last_digest = rng.choice([None, *world.adapters])
                choices = [
                    t for t in templates if last_digest is None or [u.digest for u in t.composition] == [last_digest]
                ]
                template = rng.choice(choices)
                driver.add(replace(template, seq_id=f"{template.seq_id}-{sent}"))
                sent += 1
            driver.step()
            now = set(world.runner.merged)
            installed += len(now - was)
            was = now
            _compare_finished(world, driver, alone)
        engine.check_integrity()
        assert not driver.outcomes
        assert installed >= count // 100, "sets came and went"
        assert engine.stats().num_merged_steps > count // 10


def _compare_finished(world: World, driver: Driver, alone: Alone) -> None:
    """Whoever has ended is compared with itself alone, and forgotten."""
    recorded = world.runner.recorded
    for seq_id, outcome in list(driver.outcomes.items()):
        if outcome.finish_reason is None:
            continue
        tokens, expected = alone[seq_id.partition("-")[0]]
        assert outcome.outputs[-1].failure is None
        assert outcome.tokens == tokens, seq_id
        is_merged = any(output.is_merged for output in outcome.outputs)
        is_base = seq_id.partition("-")[0] in BASE
        assert not (is_base and is_merged)
        for position, row in recorded.pop(seq_id).items():
            if is_base and world.is_batch_invariant:
                assert torch.equal(row, expected[position]), (seq_id, position)
            spread = expected[position].max() - expected[position].min()
            assert (row - expected[position]).abs().max() <= TOLERANCE * spread, (seq_id, position)
        del driver.outcomes[seq_id]


BASE = {f"t{i}" for i in range(NUM_TEMPLATES) if i % 5 == 4}
