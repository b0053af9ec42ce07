"""The promise: a request's logits in any schedule are those of the request alone.

Random schedules mix arrivals, lengths, adapters, compositions, aborts, forced preemption, prefix hits and moves between
tiers. Every logits row is compared with the row of the same request run alone: bit-equal where the machine's rows are
invariant, else within 1e-4 of the logits' range. The second half of the file shows that the suite has teeth.
"""

import random
from dataclasses import replace

import pytest
import torch

import tiny
from harness import Driver, World, make_world, random_ids, request
from loraplex.engine import batch, block_manager
from loraplex.engine.adapter_pool import AdapterPool
from loraplex.engine.engine import Engine
from loraplex.engine.messages import AdapterUse, EngineRequest
from loraplex.model import linear
from loraplex.ops import numba_tiles, torch_ops
from oracle import Oracle

SCHEDULES_PER_MODEL = 40
NUM_TEMPLATES = 24
# Room for five of the ten adapters in RAM and for three on the device.
NUM_ADAPTERS, RAM_ADAPTERS, PLACES = 10, 5, 3


class IsolationBroken(AssertionError):
    pass


class Templates:
    """Requests to draw from, each with the logits and tokens it gives when it runs alone."""

    def __init__(self, world: World, seed: int = 0):
        rng = random.Random(seed)
        self.world = world
        only = None if world.model_type != "gpt2" else ("c_attn", "c_fc", "c_proj")
        kinds = ("linear", "experts")
        digests = world.add_adapters([rng.choice((1, 2, 4, 5, 8)) for _ in range(NUM_ADAPTERS)], only, kinds=kinds)
        digests += world.add_adapters([3], ("q_proj", "v_proj", "c_attn"), first_seed=99)
        both_ends = world.add_adapters([2], None, first_seed=98, kinds=("embedding", "head"))
        with_gains = world.add_adapters([4], ("q_proj", "v_proj", "c_attn"), first_seed=97, has_vectors=True)
        alone_only = with_gains + world.add_adapters([2], only, first_seed=96, own=("leaf", "head", "embedding"))
        prefixes = [random_ids(rng.choice((16, 24, 33)), seed=100 + i) for i in range(3)]
        self.requests: list[EngineRequest] = []
        for i in range(NUM_TEMPLATES):
            kind = i % 6
            composition = world.use(None) if kind == 0 else world.use(rng.choice(digests + both_ends + alone_only))
            if kind == 5:  # two adapters with scales: overlapping segments
                first, second = rng.sample(digests, 2)
                composition = (*world.use(first, 0.5), *world.use(second, 1.5))
            prompt = [*rng.choice(prefixes), *random_ids(rng.randrange(1, 30), seed=i)]
            sampling = {"temperature": 0.9, "seed": i, "top_p": 0.9, "top_k": 40} if kind in (2, 4) else {}
            if kind == 3:
                sampling = {"prompt_logprobs": 1, "logprobs": 2}
            self.requests.append(request(f"t{i}", prompt, composition, max_tokens=rng.randrange(1, 9), **sampling))
        self.alone: dict[str, tuple[list[int], dict[int, torch.Tensor]]] = {}
        with world.engine() as engine:
            driver = Driver(engine)
            for template in self.requests:
                driver.add(template)
                driver.run()
                engine.blocks = engine.scheduler.blocks = type(engine.blocks)(  # nothing from the prefix cache
                    engine.config.num_blocks, engine.config.block_size
                )
            for template in self.requests:
                tokens = driver.outcomes[template.seq_id].tokens
                self.alone[template.seq_id] = (tokens, dict(world.runner.recorded[template.seq_id]))

    @property
    def ram_bytes(self) -> int:
        """The largest adapter beside ordinary ones (one that brings its own parameters is far larger)."""
        nbytes = sorted(weights.nbytes for weights in self.world.adapters.values())
        return nbytes[-1] + (RAM_ADAPTERS - 1) * nbytes[len(nbytes) // 2]

    def run_schedule(self, seed: int) -> dict[str, int]:
        """One random schedule; raises IsolationBroken. Returns what happened in it."""
        rng = random.Random(seed)
        world = self.world
        origin: dict[str, str] = {}
        aborted: set[str] = set()
        sizes = {
            "max_loras": PLACES,
            "adapter_cache_bytes": self.ram_bytes,
            "num_blocks": rng.choice((24, 30, 60)),
            "max_num_batched_tokens": rng.choice((12, 20, 48)),
            "max_num_seqs": rng.choice((3, 8, 12)),
            "fairness_quantum": rng.choice((2, 5, 32)),
        }
        with world.engine(**sizes) as engine:
            driver = Driver(engine)
            pending = [rng.choice(self.requests) for _ in range(rng.randrange(10, 30))]
            steps = 0
            while pending or engine.has_work:
                while pending and rng.random() < 0.4:
                    template = pending.pop()
                    seq_id = f"{template.seq_id}-{len(origin)}"
                    origin[seq_id] = template.seq_id
                    driver.add(replace(template, seq_id=seq_id))
                if origin and rng.random() < 0.03:
                    victim = rng.choice(sorted(origin))
                    if driver.outcomes[victim].finish_reason is None:
                        aborted.add(victim)
                        driver.abort(victim)
                driver.step()
                steps += 1
                assert steps < 20_000, "no progress"
            self._compare(driver, origin, aborted)
            stats = engine.stats()
        return {
            "preemptions": stats.num_preemptions,
            "prefix_hits": stats.prefix_hits,
            "evictions": stats.num_ram_evictions,
            "aborts": len(aborted),
            "distinct": stats.max_distinct_adapters,
        }

    def _compare(self, driver: Driver, origin: dict[str, str], aborted: set[str]) -> None:
        recorded = self.world.runner.recorded
        for seq_id, template_id in origin.items():
            tokens, logits = self.alone[template_id]
            got = driver.outcomes[seq_id].tokens
            if seq_id in aborted:
                tokens = tokens[: len(got)]
            if got != tokens:
                raise IsolationBroken(f"{seq_id}: tokens {got}, alone {tokens}")
            for position, row in recorded.get(seq_id, {}).items():
                if not self._equal(row, logits[position]):
                    raise IsolationBroken(f"{seq_id}: logits at {position} differ from the request alone")

    def _equal(self, row: torch.Tensor, alone: torch.Tensor) -> bool:
        if self.world.is_batch_invariant:
            return torch.equal(row, alone)
        return bool((row - alone).abs().max() <= 1e-4 * (alone.max() - alone.min()))


@pytest.fixture(scope="module", params=[*tiny.CONFIGS, *tiny.MORE_CONFIGS])
def templates(request) -> Templates:
    return Templates(make_world(request.param))


def test_random_schedules(templates: Templates):
    total: dict[str, int] = {}
    for seed in range(SCHEDULES_PER_MODEL):
        for name, count in templates.run_schedule(seed).items():
            total[name] = max(total.get(name, 0), count) if name == "distinct" else total.get(name, 0) + count
    # The schedules exercised what they claim to.
    assert total["preemptions"] > 10, total
    assert total["prefix_hits"] > 500, total
    assert total["evictions"] > 10, total
    assert total["aborts"] > 5, total
    assert total["distinct"] == PLACES, total


def test_alone_equals_the_oracle(templates: Templates):
    """What 'alone' means is itself checked against the dense implementation."""
    world = templates.world
    oracle = Oracle(world.reference, world.base.targets)
    for template in templates.requests:
        tokens, rows = templates.alone[template.seq_id]
        adapters = [(world.adapters[use.digest], use.scale) for use in template.composition]
        expected = oracle.logits([*template.token_ids, *tokens], adapters)
        for position, row in rows.items():
            spread = expected[position].max() - expected[position].min()
            assert (row - expected[position]).abs().max() <= 1e-4 * spread


def run_schedules(templates: Templates, count: int = 12) -> None:
    for seed in range(count):
        templates.run_schedule(seed)


PATHS = {
    "bfloat16": (torch.bfloat16, None, None),
    "bfloat16 without tiles": (torch.bfloat16, None, (numba_tiles, "has_tiles", lambda: False)),
    "plain products": (torch.float32, None, (linear, "is_packed", lambda weight: False)),
    "torch's ops": (torch.float32, torch_ops, None),
}


@pytest.mark.parametrize("path", PATHS)
def test_random_schedules_on_every_kernel_path(path: str, monkeypatch: pytest.MonkeyPatch):
    """Beside the usual one of float32. What oneDNN and torch do is theirs: bit-equal where the probe finds it so."""
    dtype, ops, patch = PATHS[path]
    if patch is not None:
        monkeypatch.setattr(*patch)
    world = make_world("llama", dtype, ops)
    product = world.base.model.get_submodule("model.layers.0.mlp.down_proj").way.product
    is_tiled = type(product).__name__ == "_TiledProduct"
    assert is_tiled == (path == "bfloat16" and numba_tiles.has_tiles())
    if is_tiled:
        assert world.is_batch_invariant
    if world.is_batch_invariant or dtype == torch.float32:
        run_schedules(Templates(world))


# -- teeth: each of these faults must be noticed ------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama() -> Templates:
    return Templates(make_world("llama"))


def test_notices_a_segment_boundary_moved_by_one(llama: Templates, monkeypatch: pytest.MonkeyPatch):
    build = batch.SegmentBuffers.build

    def off_by_one(self, scheduled, bounds, pool):
        step = build(self, scheduled, bounds, pool)
        if step is not None and step.segments.num_rows > len(step.spans):
            longest = int((step.segments.end - step.segments.start).argmax())
            step.segments.start[longest] += 1
        return step

    monkeypatch.setattr(batch.SegmentBuffers, "build", off_by_one)
    with pytest.raises(IsolationBroken):
        run_schedules(llama)


def test_notices_two_pool_places_swapped(llama: Templates, monkeypatch: pytest.MonkeyPatch):
    load = AdapterPool.load
    monkeypatch.setattr(
        AdapterPool, "load", lambda self, place, weights: load(self, {0: 1, 1: 0}.get(place, place), weights)
    )
    # Else the bookkeeping notices first.
    monkeypatch.setattr(Engine, "check_integrity", lambda engine: engine.scheduler.check_integrity())
    with pytest.raises(IsolationBroken):
        run_schedules(llama)


def test_notices_blocks_shared_across_digests(llama: Templates, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(block_manager, "root_hash", lambda composition, salt: b"")
    monkeypatch.setattr(block_manager.BlockManager, "check_integrity", lambda self, sequences: None)
    with pytest.raises(IsolationBroken):
        run_schedules(llama)


def test_integrity_notices_blocks_shared_across_digests(llama: Templates, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(block_manager, "root_hash", lambda composition, salt: b"")
    with pytest.raises(AssertionError, match="shared by unequal sequences"):
        run_schedules(llama, 40)


def test_notices_a_position_off_by_one(llama: Templates, monkeypatch: pytest.MonkeyPatch):
    write = batch.BatchBuffers._write_tokens

    def shifted(self, index, entry, token):
        write(self, index, entry, token)
        if index == 1:
            self._positions[token] += 1

    monkeypatch.setattr(batch.BatchBuffers, "_write_tokens", shifted)
    with pytest.raises(IsolationBroken):
        run_schedules(llama)


def test_notices_a_salt_that_is_ignored(llama: Templates):
    """Blocks of one tenant are never another's: the same prompt under another salt hits nothing."""
    world = llama.world
    prompt = random_ids(40, seed=5)
    with world.engine() as engine:
        driver = Driver(engine)
        for name, salt in (("a", b"one"), ("b", b"two"), ("c", b"one")):
            driver.add(request(name, prompt, salt=salt))
            driver.run()
        cached = {name: driver.outcomes[name].outputs[0].num_cached_tokens for name in "abc"}
    assert cached == {"a": 0, "b": 0, "c": 32}


def test_a_composition_is_not_its_parts(llama: Templates):
    """Blocks are keyed by the whole composition with its scales and order."""
    world = llama.world
    first, second = list(world.adapters)[:2]
    prompt = random_ids(40, seed=6)
    compositions: list[tuple[AdapterUse, ...]] = [
        world.use(first),
        world.use(first, 0.5),
        (*world.use(first), *world.use(second)),
        (*world.use(second), *world.use(first)),
        (),
    ]
    with world.engine() as engine:
        driver = Driver(engine)
        for i, composition in enumerate(compositions):
            driver.add(request(str(i), prompt, composition))
            driver.run()
        assert all(outcome.outputs[0].num_cached_tokens == 0 for outcome in driver.outcomes.values())
