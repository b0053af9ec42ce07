"""LoRA layers: the base is never written, base-only steps run no LoRA op, every kind of linear adds its own delta."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import tiny
from harness import Driver, fingerprint, make_world, random_ids, request
from loraplex.model.linear import is_packed
from loraplex.model.lora_layers import BaseLinear, LoRALinear, weight_and_bias
from loraplex.model.step_context import StepContext
from loraplex.model.targets import base_of, linear_targets
from loraplex.ops import torch_ops


@pytest.mark.parametrize("model_type", list(tiny.CONFIGS))
def test_serving_leaves_every_byte_of_the_base(model_type: str):
    world = make_world(model_type)
    digests = world.add_adapters([4, 2, 8])
    before = fingerprint(world)
    with world.engine(max_loras=2) as engine:
        driver = Driver(engine)
        for i in range(8):
            use = world.use(digests[i % 3] if i % 4 else None)
            driver.add(request(str(i), random_ids(20 + i, seed=i), use, temperature=float(i % 2), max_tokens=6))
        driver.run()
    assert fingerprint(world) == before


class CountingOps:
    """The reference, counting what it is asked for."""

    def __init__(self):
        self.calls: dict[str, int] = {}

    def __getattr__(self, name: str):
        if not hasattr(torch_ops, name):
            raise AttributeError(name)

        def counted(*args):
            self.calls[name] = self.calls.get(name, 0) + 1
            return getattr(torch_ops, name)(*args)

        return counted


def test_a_base_only_batch_runs_no_lora_op():
    ops = CountingOps()
    world = make_world("llama", ops=ops)
    (digest,) = world.add_adapters([4])
    num_layers, num_linears = 2, 14
    with world.engine() as engine:
        driver = Driver(engine)
        driver.add(request("a", random_ids(9, seed=0), world.use(digest), max_tokens=2))
        driver.run()
        assert ops.calls["add_lora"] >= 2 * num_linears, "with an adapter every linear adds its delta"
        ops.calls.clear()
        for i in range(4):
            driver.add(request(str(i), random_ids(9, seed=i), max_tokens=3))
        driver.run()
    assert set(ops.calls) == {"store_kv", "paged_attention"}, "adapters stand in places, and nothing runs for them"
    assert ops.calls["store_kv"] % num_layers == 0


@pytest.mark.parametrize("bias", [True, False])
def test_a_conv1d_is_a_linear_with_its_weight_the_other_way(bias: bool):
    torch.manual_seed(0)
    conv = Conv1D(6, 4)
    nn.init.normal_(conv.bias)
    linear = nn.Linear(4, 6, bias=bias)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.T)
        if bias:
            linear.bias.copy_(conv.bias)
        else:
            conv.bias.zero_()
    x = torch.randn(1, 5, 4)
    assert torch.equal(weight_and_bias(conv)[0], weight_and_bias(linear)[0])
    for module in (conv, linear):
        expected, weight = module(x), module.weight
        layer = BaseLinear(module)
        assert (layer.in_features, layer.out_features) == (4, 6)
        assert base_of(layer) is module
        assert layer.weight is module.weight
        assert layer.bias is module.bias
        assert torch.equal(layer.whole_weight(), weight)
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-6)


def test_a_weight_that_a_product_has_packed_is_nan_to_whoever_goes_around_it():
    linear = nn.Linear(4, 6)
    weight, storage = linear.weight, linear.weight.untyped_storage().nbytes()
    layer = BaseLinear(linear)
    if is_packed(weight):
        assert nn.functional.linear(torch.randn(2, 4), layer.weight).isnan().all()
        assert layer.weight.untyped_storage().nbytes() < storage
    else:
        assert layer.weight is weight
    assert (layer.weight.shape, layer.weight.dtype) == (weight.shape, weight.dtype)
    assert torch.equal(layer.whole_weight(), weight)


def test_a_lora_layer_without_a_step_is_the_base():
    linear = nn.Linear(4, 6)
    base = BaseLinear(copy.deepcopy(linear))
    layer = LoRALinear(linear, None, [], StepContext(), None)  # type: ignore[arg-type]
    x = torch.randn(2, 3, 4)
    assert torch.equal(layer(x), base(x))


def test_the_context_is_empty_after_a_step_that_failed():
    context = StepContext()
    step: object = object()

    def fail() -> None:
        with context.running(step, step):  # type: ignore[arg-type]
            assert context.body is step
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert context.body is None
    assert context.head is None


def test_a_subclass_of_a_linear_is_left_alone():
    """A router, say, answers something else than x·Wᵀ + b."""

    class Router(nn.Linear):
        pass

    model = nn.ModuleDict({"router": Router(4, 2), "plain": nn.Linear(4, 2)})
    assert list(linear_targets(model)) == ["plain"]
