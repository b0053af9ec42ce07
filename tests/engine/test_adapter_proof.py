"""The proof passes what is computed right, and finds what is not: in the adapter, and in the engine itself."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import tiny
from architectures import SERVED
from harness import World, make_world, make_world_of
from loraplex.engine.adapter_proof import AdapterProof
from loraplex.engine.probe import Probe, decoder_layers
from loraplex.engine.proof_result import ModuleFigures, ProofResult
from loraplex.lora.weights import LoRAPair, LoRAWeights, pack
from loraplex.ops import torch_ops


@pytest.fixture(scope="module")
def world() -> World:
    return make_world("llama")


def prove(
    world: World, weights: LoRAWeights, probe: Probe | None = None, between: Callable[[], None] = lambda: None
) -> ProofResult:
    """`between` runs after every slice."""
    slices = AdapterProof(world.runner, probe or Probe(world.runner), weights).run()
    while True:
        between()
        try:
            next(slices)
        except StopIteration as end:
            assert world.runner.pool.digest_in(world.runner.probe_place) is None, "the probe's place is empty again"
            return end.value


def refused(world: World, weights: LoRAWeights, *words: str) -> None:
    failure = prove(world, weights).failure
    assert failure is not None
    assert failure.code == "proof_failed"
    assert [word for word in words if word not in failure.message] == [], failure.message
    assert failure.message.count(". ") + failure.message.endswith(".") >= 2, f"no next step: {failure.message}"


SHAPES = {
    "linears": {},
    "one module": {"only": ["q_proj", "c_attn"]},
    "both ends": {"kinds": ("linear", "head", "embedding")},
    "gains and shifts": {"has_vectors": True},
    "own norms and routers": {"own": ("leaf",)},
    "own rows of tokens": {"own": ("embedding",)},
    "own head": {"own": ("head",)},
    "own linears": {"own": ("linear",), "only": []},
    "experts": {"kinds": ("linear", "experts")},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2", "qwen3_moe"])
def test_sound_adapters_pass(model_type: str, dtype: torch.dtype):
    world = make_world(model_type, dtype=dtype)
    probe = Probe(world.runner)
    for name, shape in SHAPES.items():
        weights = tiny.make_adapter(world.base.targets, rank=4, seed=3, dtype=dtype, **shape)
        result = prove(world, weights, probe)
        assert result.failure is None, f"{name}: {result.failure}"
        named = {*weights.modules, *weights.replaced}
        assert {module.name for module in result.modules} == named, name
        assert all(module.error <= result.tolerance for module in result.modules)
        assert result.isolation_error == 0 or not world.is_batch_invariant
        assert result.divergence is not None
        assert result.divergence.max_difference > 0
        assert result.divergence.num_positions == 8
        assert (result.base_fingerprint, result.dtype) == (world.base.fingerprint, str(dtype).removeprefix("torch."))
        for module in result.modules:  # every module was measured by all that applies to it
            has_delta = module.name in weights.modules and module.kind != "leaf"
            assert (module.delta is not None) == has_delta, (name, module)
            assert (module.product is not None) == (module.kind not in ("leaf", "experts")), (name, module)
            assert (module.own is not None) == (module.kind == "leaf"), (name, module)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2", "qwen3_moe"])
def test_a_pass_in_slices_gives_the_logits_of_a_pass_in_one_piece(model_type: str):
    world = make_world(model_type)
    weights = tiny.make_adapter(world.base.targets, rank=4, seed=3)
    probe = Probe(world.runner)
    probe.witness()
    assert len(probe._layers) == 2, "it is cut, and only where that gives the same bits"
    sliced = prove(world, weights, probe)
    probe._layers = []
    whole = prove(world, weights, probe)
    assert sliced.num_slices == whole.num_slices + 2
    assert sliced.divergence == whole.divergence
    assert sliced.modules == whole.modules


def test_steps_in_between_change_nothing(world: World):
    """The pass is cut after every layer, and another pass runs there, over the same buffers of every module."""
    weights = tiny.make_adapter(world.base.targets, rank=4, seed=3, kinds=("linear", "head", "embedding"))
    alone = prove(world, weights)
    probe, second = Probe(world.runner), Probe(world.runner)
    probe.witness()

    def disturb() -> None:
        for _ in second.run(None):
            pass

    disturbed = prove(world, weights, probe, disturb)
    assert disturbed.divergence == alone.divergence
    assert disturbed.modules == alone.modules


@pytest.mark.parametrize("name", SERVED)
def test_no_architecture_has_its_adapters_refused(name: str):
    """Also where a module has one output only, as qwen2_moe's shared gate: it may cancel to next to nothing."""
    model_type, config, *_ = SERVED[name]
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config), dtype=torch.float32)
        world = make_world_of(tiny.sharpen(model).to(dtype), model_type)
        probe = Probe(world.runner)
        for shape in (SHAPES["linears"], SHAPES["both ends"], SHAPES["gains and shifts"], SHAPES["experts"]):
            weights = tiny.make_adapter(world.base.targets, rank=4, seed=3, dtype=dtype, **shape)
            assert prove(world, weights, probe).failure is None
        assert probe._layers, "it can be cut"


def test_a_model_whose_layers_cannot_be_told_runs_in_one_piece(world: World, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("loraplex.engine.probe.decoder_layers", lambda model: [torch.nn.Linear(1, 1)])
    probe = Probe(world.runner)
    probe.witness()
    assert probe._layers == []
    assert len(decoder_layers(world.base.model)) == 2
    assert prove(world, tiny.make_adapter(world.base.targets, rank=4, seed=3), probe).failure is None


# -- what only running it shows of an adapter -------------------------------------------------------------------


def changed(weights: LoRAWeights, change: Callable[[torch.Tensor], torch.Tensor]) -> LoRAWeights:
    return replace(weights, slab=change(weights.slab))


def test_an_adapter_without_effect(world: World):
    weights = tiny.make_adapter(world.base.targets, rank=4, seed=3)
    refused(world, changed(weights, torch.zeros_like), "without effect", "last bit")


def test_numbers_so_small_that_they_vanish():
    world = make_world("llama", dtype=torch.bfloat16)
    weights = tiny.make_adapter(world.base.targets, rank=4, seed=3, dtype=torch.bfloat16)
    refused(world, changed(weights, lambda slab: slab * 1e-4), "without effect", "bfloat16", "vanish in rounding")


def test_finite_numbers_whose_product_is_not(world: World):
    weights = tiny.make_adapter(world.base.targets, rank=4, seed=3, only=["v_proj"])
    refused(world, changed(weights, lambda slab: torch.full_like(slab, 3e38)), "NaN or infinity", "v_proj")


def test_an_overflow_of_float16():
    """Far within float32 and bfloat16, beyond 65504."""
    world = make_world("llama", dtype=torch.float16, ops=torch_ops)
    weights = tiny.make_adapter(world.base.targets, rank=4, seed=3, only=["up_proj"], dtype=torch.float16)
    assert prove(world, weights).failure is None
    refused(world, changed(weights, lambda slab: slab * 300), "NaN or infinity", "up_proj", "float16", "--dtype")


def test_an_attention_that_overflows_beside_the_modules(world: World):
    """Every product is finite; the softmax of them is not."""
    last = {name: shape for name, shape in world.base.targets.items() if "layers.1" in name}
    weights = tiny.make_adapter(last, rank=4, seed=3, only=["q_proj", "k_proj"], scaling=1.0)
    refused(world, changed(weights, lambda slab: slab * 1e11), "logits are NaN or infinite")


@pytest.mark.parametrize("module", ["q_proj", "v_proj", "down_proj"])
def test_numbers_at_the_end_of_the_range_are_no_proof(module: str, world: World):
    """Where the sums in float32 leave its range, or nearly: refused, or proven with figures that are numbers."""
    for exponent in (30, 34, 36, 37, 38):
        weights = tiny.make_adapter(world.base.targets, rank=4, seed=3, only=[module])
        delta = weights.modules[f"model.layers.0.{'mlp' if module == 'down_proj' else 'self_attn'}.{module}"]
        slab = weights.slab.clone()
        slab[delta.offset_b + 3] = 10.0**exponent
        result = prove(world, replace(weights, slab=slab))
        figures = [f for m in result.modules for f in (m.delta, m.product) if f is not None]
        assert all(math.isfinite(figure) for figure in figures)
        assert result.failure is not None or all(m.error <= result.tolerance for m in result.modules)


def test_no_number_is_the_largest_error():
    for figures in ((0.0, math.nan), (math.nan, 0.0), (math.nan, None)):
        assert math.isnan(ModuleFigures("a", "linear", *figures).error)


def test_logits_that_are_finite_and_beyond_use(world: World):
    """A head so large that the distance to the base's probabilities is infinite: nothing that could be recorded."""
    weights = tiny.make_adapter(world.base.targets, rank=4, seed=3, only=[], own=("head",))
    moderate = prove(world, changed(weights, lambda slab: slab * 1e30)).divergence
    assert moderate is not None
    factor = 1e30 * 3e38 / moderate.max_difference  # the largest logit is just below the end of float32
    refused(world, changed(weights, lambda slab: slab * factor), "so large that probabilities")
    factor = 1e30 * 3e38 / moderate.max_kl  # every distance is within float32, and their sum is not
    found = prove(world, changed(weights, lambda slab: slab * factor)).divergence
    assert found is not None
    assert math.isfinite(found.mean_kl)
    assert 8 * found.mean_kl > 3.5e38


def test_rows_of_tokens_that_no_fixed_text_has(world: World):
    """Its only effect is on one token, which the probe therefore reads."""
    targets = world.base.targets
    embedding = next(shape for shape in targets.values() if shape.kind == "embedding")
    fixed = Probe(world.runner)._fixed
    token = next(token for token in range(tiny.VOCAB) if token not in fixed)
    a = torch.zeros(2, embedding.in_features)
    a[:, token] = 1.0
    weights = pack("1" * 64, [LoRAPair(embedding, a, torch.randn(embedding.out_features, 2), 1.0)], torch.float32)
    result = prove(world, weights)
    assert result.failure is None
    assert result.divergence is not None


# -- faults of the engine ---------------------------------------------------------------------------------------

Plant = Callable[[World, pytest.MonkeyPatch], None]


def wrong_table(table: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Plant:
    """The pool tells the kernels something wrong about one module."""

    def plant(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        pool = world.runner.pool
        load = pool.load

        def spoiled(place: int, weights: LoRAWeights) -> None:
            load(place, weights)
            row = getattr(pool.modules["model.layers.1.mlp.up_proj"], table)
            row[place] = change(row[place])

        monkeypatch.setattr(pool, "load", spoiled)

    return plant


def wrong_kernel(change: Callable[[Callable], Callable]) -> Plant:
    def plant(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        ops = world.runner.ops
        monkeypatch.setattr(ops, "add_lora", change(ops.add_lora))

    return plant


def into_the_next_row(add_lora: Callable) -> Callable:
    def spoiled(y, x, pool, lora):
        lora = replace_segments(lora, end=(lora.end + 1).clamp(max=len(y)))
        add_lora(y, x, pool, lora)

    return spoiled


def replace_segments(lora, **changes):
    names = ("start", "end", "place", "scale", "offset", "num_rows", "max_rank")
    values = {name: getattr(lora, name) for name in names} | changes
    values["num_rows"] = int((values["end"] - values["start"]).sum())
    return type(lora)(**values)


def in_coarse_numbers(add_lora: Callable) -> Callable:
    """As if the deltas were summed in a narrow type."""

    def spoiled(y, x, pool, lora):
        delta = torch.zeros_like(y)
        add_lora(delta, x, pool, lora)
        y += delta.to(torch.float8_e4m3fn).to(y.dtype)

    return spoiled


ENGINE_FAULTS: dict[str, tuple[Plant, tuple[str, ...]]] = {
    "A of the neighbour": (
        wrong_table("offset_a", lambda at: at + 1),
        ("layers.1.mlp.up_proj", "fault of this server"),
    ),
    "B of the neighbour": (wrong_table("offset_b", lambda at: at - 1), ("layers.1.mlp.up_proj",)),
    "another scaling": (wrong_table("scaling", lambda scaling: scaling * 1.01), ("layers.1.mlp.up_proj",)),
    "a rank too small": (wrong_table("rank", lambda rank: rank - 1), ("layers.1.mlp.up_proj",)),
    "a module left out": (wrong_table("rank", lambda rank: rank * 0), ("layers.1.mlp.up_proj",)),
    "into the next row": (wrong_kernel(into_the_next_row), ("rows of the batch that are not its own",)),
    "the first row left out": (
        wrong_kernel(
            lambda add_lora: lambda y, x, pool, lora: add_lora(y, x, pool, replace_segments(lora, start=lora.start + 1))
        ),
        ("differs from the adapter's own arithmetic",),
    ),
    "coarse numbers": (wrong_kernel(in_coarse_numbers), ("differs from the adapter's own arithmetic",)),
}


@pytest.mark.parametrize("fault", ENGINE_FAULTS)
def test_a_fault_of_the_engine_is_found(fault: str, world: World, monkeypatch: pytest.MonkeyPatch):
    plant, words = ENGINE_FAULTS[fault]
    weights = tiny.make_adapter(world.base.targets, rank=4, seed=3)
    probe = Probe(world.runner)
    probe.witness()
    plant(world, monkeypatch)
    failure = prove(world, weights, probe).failure
    assert failure is not None
    assert [word for word in words if word not in failure.message] == [], failure.message


@pytest.mark.parametrize("part", ["gain", "shift", "replaced"])
def test_a_wrong_extra_is_found(part: str, world: World, monkeypatch: pytest.MonkeyPatch):
    kwargs = {"own": ("head",)} if part == "replaced" else {"has_vectors": True}
    weights = tiny.make_adapter(world.base.targets, rank=4, seed=3, **kwargs)
    pool = world.runner.pool
    load = pool.load
    name = "lm_head" if part == "replaced" else "model.layers.0.self_attn.o_proj"

    def spoiled(place: int, adapter: LoRAWeights) -> None:
        load(place, adapter)
        extra = pool.extras[name][place]
        assert extra is not None
        value = getattr(extra, part)
        other = {"weight": value["weight"].roll(1, 0)} if part == "replaced" else value.roll(1)
        pool.extras[name][place] = replace(extra, **{part: other})

    monkeypatch.setattr(pool, "load", spoiled)
    failure = prove(world, weights).failure
    assert failure is not None
    assert name in failure.message


def test_a_neighbour_that_the_adapter_moves_is_found(world: World, monkeypatch: pytest.MonkeyPatch):
    """Not by a module's delta: somewhere between them."""
    weights = tiny.make_adapter(world.base.targets, rank=4, seed=3)
    probe = Probe(world.runner)
    probe.witness()
    forward = world.runner.forward

    def leaking(batch):
        logits, step = forward(batch)
        if batch.lora is not None:
            logits[0] += 0.1 * logits[len(logits) // 2]
        return logits, step

    monkeypatch.setattr(world.runner, "forward", leaking)
    failure = prove(world, weights, probe).failure
    assert failure is not None
    assert "beside it, rows of the base differ" in failure.message
