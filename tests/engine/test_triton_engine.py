"""A whole engine on Triton's kernels: every request's logits are those of the CPU's engine.

On a GPU the model stands there; without one the kernels run in Triton's interpreter, on the CPU's tensors.
"""

import copy

import pytest
import torch

import tiny
from harness import Driver, World, make_world_of, random_ids, request
from loraplex.model.groups import Member
from loraplex.model.loader import wrap_model
from loraplex.model.lora_layers import LoRALinear

triton_ops = pytest.importorskip("loraplex.ops.triton_ops", reason="Triton has no build for this platform")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def run(world: World) -> tuple[dict[str, list[int]], dict[str, dict[int, torch.Tensor]]]:
    """Base, adapters of several ranks and kinds, a composition; chunked prompts beside decoding, two places for four
    adapters. Returns tokens and logits by request."""
    first, second, third = world.add_adapters([8, 3, 16], ("q_proj", "v_proj", "down_proj"))
    ends = world.add_adapters([2], None, first_seed=98, kinds=("embedding", "head"))[0]
    gains = world.add_adapters([4], ("q_proj", "o_proj"), first_seed=97, has_vectors=True)[0]
    several = (*world.use(second, 0.5), *world.use(third, 1.5))
    compositions = [(), world.use(first), world.use(second), several, world.use(ends), world.use(gains)]
    with world.engine(max_loras=2, max_num_batched_tokens=24) as engine:
        driver = Driver(engine)
        for index, composition in enumerate(compositions):
            driver.add(request(f"r{index}", random_ids(9 + 7 * index, seed=index), composition, max_tokens=4))
            driver.step()
        sampled = {"temperature": 0.8, "seed": 5, "top_k": 20}
        driver.add(request("sampled", random_ids(20, seed=50), world.use(first), max_tokens=4, **sampled))
        outcomes = driver.run()
        tokens = {name: outcome.tokens for name, outcome in outcomes.items()}
        return tokens, {name: dict(rows) for name, rows in world.runner.recorded.items()}


def group_is_adapted(world: World) -> bool:
    layers = [module for module in world.base.model.modules() if isinstance(module, LoRALinear)]
    members = [layer.way for layer in layers if isinstance(layer.way, Member)]
    return len(members) == 2 * 5 and all(member.group.adapt is not None for member in members)


@pytest.mark.parametrize("model_type", [pytest.param("llama", marks=pytest.mark.slow), "gemma2"])
def test_an_engine_on_triton_answers_as_the_cpus_does(model_type: str) -> None:
    """gemma2: windows, caps and a scaled embedding. The load's proof has passed on the kernels already."""
    model = tiny.make_model(model_type)
    there = make_world_of(
        model, model_type, triton_ops, wrap_model(copy.deepcopy(model), DEVICE), num_blocks=64, max_model_len=96
    )
    assert group_is_adapted(there), "q, k, v and gate, up add their adapters together"
    tokens, logits = run(there)
    here = make_world_of(copy.deepcopy(model), model_type, num_blocks=64, max_model_len=96)
    wanted_tokens, wanted = run(here)
    for name, rows in wanted.items():
        for position, row in rows.items():
            error = (logits[name][position].cpu() - row).abs().max()
            assert error <= 1e-4 * (row.max() - row.min()), f"{name} at {position}"
    assert tokens == wanted_tokens


@pytest.mark.slow
def test_experts_on_triton_are_the_cpus() -> None:
    """An adapter on every expert's linears; their products are shrinks, too."""
    model = tiny.make_model("qwen3_moe")
    worlds = [
        make_world_of(model, "qwen3_moe", triton_ops, wrap_model(copy.deepcopy(model), DEVICE), max_model_len=96),
        make_world_of(copy.deepcopy(model), "qwen3_moe", max_model_len=96),
    ]
    found = []
    for world in worlds:
        digest = world.add_adapters([4], None, kinds=("linear", "experts"))[0]
        with world.engine() as engine:
            driver = Driver(engine)
            driver.add(request("base", random_ids(6, seed=1), (), max_tokens=2))
            driver.add(request("adapted", random_ids(7, seed=2), world.use(digest), max_tokens=2))
            driver.run()
        found.append({name: dict(rows) for name, rows in world.runner.recorded.items()})
    for name, rows in found[1].items():
        for position, row in rows.items():
            error = (found[0][name][position].cpu() - row).abs().max()
            assert error <= 1e-4 * (row.max() - row.min()), f"{name} at {position}"
