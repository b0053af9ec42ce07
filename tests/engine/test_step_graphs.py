"""Captured steps: captured with one adapter, replayed with many; the base alone; other lengths, other places.

Graphs stand for themselves on a GPU; without one each replay runs the recorded call again (`step_reruns`).
"""

import copy
from dataclasses import replace

import pytest
import torch
from scheduler_rig import make_sequence, uses

import tiny
from harness import Driver, World, make_config, make_world_of, random_ids, request
from loraplex.engine import step_graphs
from loraplex.engine.batch import Capacity
from loraplex.engine.scheduled_batch import ScheduledBatch, ScheduledSequence
from loraplex.engine.sequence import Sequence
from loraplex.engine.step_graphs import CudaCapture, StepGraphs, capacity_for, rank_sizes, row_sizes
from loraplex.model.loader import wrap_model

triton_ops = pytest.importorskip("loraplex.ops.triton_ops", reason="Triton has no build for this platform")
HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
if not HAS_GPU:
    from step_reruns import Reruns

# -- which steps --------------------------------------------------------------------------------------------------


class FakePool:
    """The adapter in place p has rank 8 p up to place 6, and 8; 7 is on the head, 8 on the embedding, 9 more than
    deltas."""

    def max_rank(self, places: list[int]) -> int:
        return max((8 * place if place < 7 else 8 for place in places), default=0)

    def is_additive(self, place: int) -> bool:
        return place != 9

    def changes_head(self, places) -> bool:
        return 7 in places

    def changes_embedding(self, places) -> bool:
        return 8 in places


def entry(index: int, places: tuple[int, ...] = (), num_new_tokens: int = 1, left: int = 0) -> ScheduledSequence:
    seq = make_sequence(f"s{index}", range(20), uses(*map(str, places)))
    seq.num_computed_tokens = 20 - num_new_tokens - left
    return ScheduledSequence(seq, num_new_tokens, places)


SIZES = {"max_num_seqs": 11, "max_num_batched_tokens": 64, "graph_rank": 40}


@pytest.mark.parametrize(
    ("places", "capacity"),
    [
        ([()], Capacity(4, 0)),
        ([()] * 4, Capacity(4, 0)),
        ([()] * 5, Capacity(8, 0)),
        ([()] * 9, Capacity(12, 0)),
        ([(1,), ()], Capacity(4, 16)),
        ([(2,), (2,), (1,), (1,), (1,)], Capacity(8, 16)),
        ([(3,), ()], Capacity(4, 32)),
        ([(5,)], Capacity(4, 64)),
        ([(1, 2), (1, 2, 3)], Capacity(8, 32)),
        ([(1, 2)] * 7, None),  # more rows of segments than any graph has room for
        ([(6,), ()], None),  # wider than graph_rank
        ([(7,)], None),
        ([(8,), (1,)], None),
        ([(9,)], None),
    ],
    ids=str,
)
def test_the_smallest_size_that_takes_the_step(places: list[tuple[int, ...]], capacity: Capacity | None):
    batch = ScheduledBatch(0, tuple(entry(i, own) for i, own in enumerate(places)), ())
    assert capacity_for(batch, FakePool(), make_config(**SIZES)) == capacity  # type: ignore[arg-type]


CHUNKS = {"two": entry(1, (), 2), "prompt": entry(1, (), 20), "chunk": entry(1, (), 1, left=3)}


@pytest.mark.parametrize("other", CHUNKS.values(), ids=CHUNKS)
def test_none_for_prefill(other: ScheduledSequence):
    batch = ScheduledBatch(0, (entry(0), other), ())
    assert capacity_for(batch, FakePool(), make_config(**SIZES)) is None  # type: ignore[arg-type]


def test_none_unless_asked_for_and_none_for_nothing():
    batch = ScheduledBatch(0, (entry(0),), ())
    assert make_config().graph_rank is None, "by default nothing is captured"
    assert capacity_for(batch, FakePool(), make_config(**SIZES | {"graph_rank": None})) is None  # type: ignore[arg-type]
    assert capacity_for(ScheduledBatch(0, (), ()), FakePool(), make_config(**SIZES)) is None  # type: ignore[arg-type]


def test_sizes():
    assert row_sizes(1) == row_sizes(4) == (4,)
    assert row_sizes(11) == (4, 8, 12)
    assert row_sizes(256) == (4, 8, 16, 32, 64, 128, 256)
    assert rank_sizes(8) == rank_sizes(16) == (0, 16)
    assert rank_sizes(64) == (0, 16, 32, 64)


# -- what they compute --------------------------------------------------------------------------------------------

PLACES = 5


@pytest.fixture(scope="module")
def world() -> World:
    """The proof at load has run its decoding as graphs already."""
    model = tiny.make_model("llama", num_hidden_layers=1)
    base = wrap_model(copy.deepcopy(model), DEVICE)
    capture = CudaCapture() if HAS_GPU else Reruns()
    sizes = {"max_num_seqs": 6, "max_loras": PLACES, "num_blocks": 48, "max_model_len": 64, "graph_rank": 32}
    world = make_world_of(model, "llama", triton_ops, base, capture, **sizes)
    assert world.runner._graphs is not None
    assert world.runner._graphs.captured == (Capacity(4, 0),)
    world.add_adapters([4, 8, 16, 3], ("q_proj", "v_proj", "down_proj"))
    world.add_adapters([20], ("o_proj", "gate_proj"), first_seed=30)
    return world


class Decoding:
    """Sequences of a world that stand in its cache, and their next step on both ways."""

    def __init__(self, world: World):
        self.world = world
        self.runner = world.runner
        self.runner.config = world.config  # an engine leaves its own
        self.digests = list(world.adapters)
        self.place_of: dict[int, int] = {}
        self.seqs: list[Sequence] = []

    def load(self, *adapters: int | None) -> None:
        """Put adapters into places, in this order."""
        self.place_of = {adapter: place for place, adapter in enumerate(adapters) if adapter is not None}
        for adapter, place in self.place_of.items():
            self.runner.pool.load(place, self.world.adapters[self.digests[adapter]])

    def add(self, length: int, *adapters: int, scale: float = 1.0) -> None:
        index = len(self.seqs)
        composition = tuple(use for a in adapters for use in self.world.use(self.digests[a], scale))
        seq = make_sequence(f"s{index}", random_ids(length, seed=index), composition)
        seq.block_table = list(range(8 * index, 8 * index + 8))
        self.seqs.append(seq)
        self.run(seq, num_new_tokens=length - 1)
        seq.num_computed_tokens = length - 1

    def batch(self, *seqs: Sequence, num_new_tokens: int = 1) -> ScheduledBatch:
        places = [tuple(self.place_of[self.digests.index(use.digest)] for use in s.request.composition) for s in seqs]
        entries = (ScheduledSequence(s, num_new_tokens, own) for s, own in zip(seqs, places, strict=True))
        return ScheduledBatch(0, tuple(entries), ())

    def run(self, *seqs: Sequence, num_new_tokens: int = 1) -> tuple[torch.Tensor, bool]:
        logits, step, _ = self.runner.logits(self.batch(*seqs, num_new_tokens=num_new_tokens))
        return logits.clone(), step is None

    def step(self, *indices: int) -> None:
        """One token of these sequences, captured and in eager mode: the same logits, the same cache."""
        seqs = [self.seqs[i] for i in indices]
        found, was_graph = self.run(*seqs)
        assert was_graph
        cache = [layer.k.clone() for layer in self.runner.cache.layers.values()]
        config, self.runner.config = self.runner.config, replace(self.runner.config, graph_rank=None)
        wanted, was_graph = self.run(*seqs)
        self.runner.config = config
        assert not was_graph
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        for before, layer in zip(cache, self.runner.cache.layers.values(), strict=True):
            torch.testing.assert_close(layer.k, before, rtol=1e-5, atol=1e-5)
        for seq, row in zip(seqs, wanted, strict=True):
            seq.num_computed_tokens += 1
            seq.token_ids.append(int(row.argmax()))


def test_captured_with_one_adapter_replayed_with_many(world: World):
    graphs = world.runner._graphs
    assert graphs is not None
    decoding = Decoding(world)
    decoding.load(0, 1, 2, 3)
    for length, adapters in ((5, (0,)), (9, (1,)), (17, (2,)), (3, ()), (24, (3,)), (8, (0, 2))):
        decoding.add(length, *adapters, scale=0.5 if len(adapters) > 1 else 1.0)
    decoding.step(0)
    assert set(graphs.captured) == {Capacity(4, 0), Capacity(4, 16)}
    decoding.step(0, 1, 2, 4)  # four adapters in the graph of one
    decoding.step(3, 5)  # the base beside a composition
    decoding.step(3)  # the base alone
    decoding.load(None, 3, 0, 2, 1)  # other places
    decoding.step(0, 1, 3, 4)
    assert set(graphs.captured) == {Capacity(4, 0), Capacity(4, 16)}, "no step needed a graph of its own"
    decoding.step(0, 1, 2, 4, 3)  # five rows
    assert set(graphs.captured) == {Capacity(4, 0), Capacity(4, 16), Capacity(8, 16)}
    decoding.step(2)


def test_before_the_first_request_every_size_can_be_captured(world: World):
    """Of no rows at all, and then replayed with some."""
    graphs = world.runner._graphs
    assert graphs is not None
    graphs._replays.clear()
    config, world.runner.config = world.runner.config, replace(world.runner.config, max_num_seqs=4)
    try:
        cache = [layer.k.clone() for layer in world.runner.cache.layers.values()]
        world.runner.capture_graphs()
        assert set(graphs.captured) == {Capacity(4, 0), Capacity(4, 16), Capacity(4, 32)}
        for before, layer in zip(cache, world.runner.cache.layers.values(), strict=True):
            assert torch.equal(layer.k, before), "what is captured of no rows stores nothing"
        decoding = Decoding(world)
        decoding.load(4, 1)
        decoding.add(6, 4)
        decoding.add(11, 1)
        decoding.step(0, 1)
    finally:
        world.runner.config = config


def test_an_engine_with_graphs_answers_as_one_without(world: World, monkeypatch: pytest.MonkeyPatch):
    found, ranks, run = [], set(), StepGraphs.run
    monkeypatch.setattr(StepGraphs, "run", lambda *call: ranks.add(call[1].max_rank) or run(*call))
    for rank in (32, None):
        with world.engine(max_loras=2, max_num_batched_tokens=12, graph_rank=rank) as engine:
            driver = Driver(engine)
            for i, digest in enumerate([None, *list(world.adapters)[:3]]):
                driver.add(request(f"r{i}", random_ids(5 + i, seed=i), world.use(digest), max_tokens=3))
            sampled = {"temperature": 0.8, "seed": 5, "top_k": 20, "top_p": 0.9, "logprobs": 2}
            driver.add(request("sampled", random_ids(4, seed=50), (), max_tokens=3, **sampled))
            outcomes = driver.run()
            found.append({name: outcome.tokens for name, outcome in outcomes.items()})
        assert 16 in ranks, "decoding ran as graphs"
        monkeypatch.setattr(StepGraphs, "run", lambda *call: pytest.fail("no graph was asked for"))
    assert found[0] == found[1]


# -- teeth ----------------------------------------------------------------------------------------------------------

needs_reruns = pytest.mark.skipif(HAS_GPU, reason="is about the stand-in for graphs")


@needs_reruns
def test_notices_a_plan_that_is_kept(world: World, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(step_graphs, "_anew", lambda batch: batch)
    decoding = Decoding(world)
    decoding.load(0, 1)
    decoding.add(5, 0)
    decoding.add(6, 1)
    monkeypatch.setattr(world.runner, "_graphs", StepGraphs(world.runner._whole_logits, Reruns(), 6))
    decoding.step(0)
    with pytest.raises(AssertionError):
        decoding.step(1, 0)


@needs_reruns
@pytest.mark.parametrize("fault", ["number", "address", "wait"])
def test_notices_what_a_graph_would_have_kept(fault: str):
    x, numbers, steps = torch.zeros(4), torch.arange(4.0), iter(range(1, 9))
    others = [torch.ones(4) for _ in range(8)]

    def call() -> None:
        step = next(steps)
        match fault:
            case "number":
                x.add_(step)
            case "address":
                x.add_(others[step])
            case "wait":
                x.add_(float(numbers[0]))

    with pytest.raises(AssertionError, match="waits|kept"):
        Reruns()(call)()


@needs_reruns
def test_lets_pass_what_a_graph_repeats():
    x, numbers = torch.zeros(4), torch.arange(4.0)
    replay = Reruns()(lambda: x.copy_((numbers * 2).cumsum(0)))
    numbers += 1
    replay()
    assert x.tolist() == [2.0, 6.0, 12.0, 20.0]
