"""W′ = W + s·B·A: equal to the oracle on every kind of module, beside a base whose bytes never change."""

import pytest
import torch

import tiny
from harness import Driver, World, fingerprint, make_world, random_ids, request
from loraplex.engine.messages import Composition
from loraplex.lora.weights import LoRAPair, pack
from loraplex.model.merged import NotFinite, merge, merged_nbytes
from oracle import Oracle

KINDS = {
    "all": ("linear", "head", "embedding", "experts"),
    "embedding": ("embedding",),
    "head": ("head",),
}


def logits_of(world: World, composition: Composition, prompt: list[int]) -> torch.Tensor:
    """[prompt, V], through the engine."""
    with world.engine() as engine:
        driver = Driver(engine)
        driver.add(request("r", prompt, composition, max_tokens=1, prompt_logprobs=0))
        driver.run()
        rows = world.runner.recorded["r"]
        return torch.stack([rows[position] for position in sorted(rows)])


def merged_logits_of(world: World, digest: str, prompt: list[int]) -> torch.Tensor:
    """The same on merged weights, whose step is asked to have run on them."""
    world.runner.install(merge(world.base, world.adapters[digest], world.runner.ops))
    seen = []
    forward = world.runner.forward
    try:
        world.runner.forward = lambda batch, merged=None: seen.append(merged) or forward(batch, merged)  # type: ignore
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("loraplex.engine.adapter_merges.AdapterMerges.observe", lambda self, sole, use: None)
            patch.setattr("loraplex.engine.adapter_merges.AdapterMerges.check_integrity", lambda self: None)
            logits = logits_of(world, world.use(digest), prompt)
    finally:
        del world.runner.forward
    assert seen == [digest] * len(seen), "every step ran on the set"
    assert not world.runner.merged, "the engine has dropped it"
    return logits


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("model_type", [*tiny.CONFIGS, *tiny.MORE_CONFIGS])
def test_every_kind_of_module_on_every_base(model_type: str, kinds: str):
    world = make_world(model_type)
    before = fingerprint(world)
    (digest,) = world.add_adapters([4], kinds=KINDS[kinds])
    weights = world.adapters[digest]
    if not weights.modules:
        assert all(shape.kind not in KINDS[kinds] for shape in world.base.targets.values())
        return
    prompt = random_ids(25, seed=1)
    merged = merged_logits_of(world, digest, prompt)
    expected = Oracle(world.reference, world.base.targets).logits(prompt, [(weights, 1.0)])
    spread = expected.max() - expected.min()
    assert (merged - expected).abs().max() <= 1e-4 * spread
    base = logits_of(world, (), prompt)
    assert (merged - base).abs().max() > 1e-2 * spread, "the adapter has an effect"
    assert fingerprint(world) == before


def test_one_of_a_group_takes_the_group_along():
    world = make_world("llama")
    (digest,) = world.add_adapters([4], ("v_proj",))
    weights = world.adapters[digest]
    prompt = random_ids(25, seed=2)
    expected = Oracle(world.reference, world.base.targets).logits(prompt, [(weights, 1.0)])
    logits = merged_logits_of(world, digest, prompt)
    assert (logits - expected).abs().max() <= 1e-4 * (expected.max() - expected.min())
    merged = merge(world.base, weights, world.runner.ops)
    assert merged.nbytes == merged_nbytes(world.base, weights)
    assert {name.rpartition(".")[2] for name in merged.linears} in ({"q_proj", "k_proj", "v_proj"}, {"v_proj"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_stated_error_is_what_rounding_takes(dtype: torch.dtype):
    world = make_world("llama", dtype)
    (digest,) = world.add_adapters([4], ("down_proj",), scaling=0.05)
    weights = world.adapters[digest]
    merged = merge(world.base, weights, world.runner.ops)
    lost = whole = 0.0
    for name, delta in weights.modules.items():
        shape = world.base.targets[name]
        before = world.base.tensor_of(f"{name}.weight").double()
        exact = delta.scaling * weights.bt(shape).double().T @ weights.a(shape).double()
        after = merged.linears[name].weight()
        torch.testing.assert_close(after.double(), before + exact, rtol=torch.finfo(dtype).eps, atol=1e-7)
        lost += float((after.double() - before - exact).square().sum())
        whole += float(exact.square().sum())
    assert merged.error == pytest.approx((lost / whole) ** 0.5, rel=0.02)
    assert (merged.error > 1e-3) == (dtype == torch.bfloat16)


def test_a_weight_beyond_the_dtype_is_no_weight():
    world = make_world("llama")
    shape = next(shape for shape in world.base.targets.values() if shape.kind == "linear")
    pair = LoRAPair(shape, torch.full((1, shape.in_features), 1e20), torch.full((shape.out_features, 1), 1e20), 1.0)
    with pytest.raises(NotFinite, match="float32"):
        merge(world.base, pack("a" * 64, [pair], torch.float32), world.runner.ops)


def test_progress_counts_modules_and_can_end_the_work():
    world = make_world("llama")
    (digest,) = world.add_adapters([4])
    seen: list[tuple[int, int]] = []
    merge(world.base, world.adapters[digest], world.runner.ops, lambda done, count: seen.append((done, count)))
    assert [done for done, _ in seen] == list(range(14))
    assert {count for _, count in seen} == {14}

    def stop(done: int, count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(world.base, world.adapters[digest], world.runner.ops, stop)
