"""Stacks of experts: transformers' own arithmetic, each row by itself, and every adapter's delta on every expert."""

import copy

import pytest
import torch
from matrix import build
from torch import nn

from loraplex.engine.adapter_pool import AdapterPool
from loraplex.lora.weights import LoRAPair, ModuleShape, pack
from loraplex.model.experts import LoRAExperts, expert_parameters
from loraplex.model.step_context import Span, StepContext, StepLoRA
from loraplex.model.targets import find_targets
from loraplex.ops import LoRASegments, select_ops

TOP_K = 2
PATHS = {"mixtral": "model.layers.1.mlp.experts", "gpt_oss": "model.layers.1.mlp.experts"}


class Rig:
    """One stack of experts with three adapters in places 0 to 2: on both parameters, on the second only, on neither."""

    def __init__(self, name: str):
        model = build(name)
        path = PATHS[name]
        self.eager: nn.Module = copy.deepcopy(model.get_submodule(path))
        self.eager.config._experts_implementation = "eager"  # type: ignore[union-attr]
        targets = {n: shape for n, shape in find_targets(model).items() if shape.kind == "experts" and path in n}
        self.shapes = list(targets.values())
        self.pool = AdapterPool(targets, 3, torch.device("cpu"))
        generator = torch.Generator().manual_seed(1)
        self.weights = [pack(str(i), self._pairs(i, generator), torch.float32) for i in range(3)]
        for place, weights in enumerate(self.weights):
            self.pool.load(place, weights)
        self.context = StepContext()
        pools = {shape.name.rpartition(".")[2]: self.pool.modules[shape.name] for shape in self.shapes}
        self.layer = LoRAExperts(model.get_submodule(path), pools, self.context, select_ops("cpu"))

    def _pairs(self, place: int, generator: torch.Generator) -> list[LoRAPair]:
        chosen = {0: self.shapes, 1: self.shapes[1:], 2: []}[place]
        return [self._pair(shape, 3 + place, generator) for shape in chosen]

    @staticmethod
    def _pair(shape: ModuleShape, rank: int, generator: torch.Generator) -> LoRAPair:
        a = torch.randn(shape.num_experts, rank, shape.in_features, generator=generator) / 8
        b = torch.randn(shape.num_experts, shape.out_features, rank, generator=generator) * 0.3
        return LoRAPair(shape, a, b, 0.5)

    def inputs(self, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(num_tokens)
        x = torch.randn(num_tokens, self.shapes[0].in_features, generator=generator)
        top = torch.randn(num_tokens, self.shapes[0].num_experts, generator=generator).topk(TOP_K)
        return x, top.indices, top.values.softmax(-1)

    def run(self, inputs: tuple[torch.Tensor, ...], spans: list[tuple[int, int, int, float]]) -> torch.Tensor:
        """spans: (start, end, place, scale)"""
        offset, found = 0, []
        for start, end, place, scale in spans:
            found.append(Span(start, end, place, offset, scale))
            offset += end - start
        zero = torch.zeros(0, dtype=torch.int32)
        segments = LoRASegments(zero, zero, zero, zero.float(), zero, offset, 0)
        with self.context.running(StepLoRA(segments, tuple(found)) if spans else None):
            return self.layer(*inputs)

    def expected(self, inputs: tuple[torch.Tensor, ...], adapters: list[tuple[int, float]]) -> torch.Tensor:
        """transformers' own loop over experts whose weights are W + Σ scale · scaling · B·A."""
        merged = copy.deepcopy(self.eager)
        for shape in self.shapes:
            parameter = getattr(merged, shape.name.rpartition(".")[2])
            for place, scale in adapters:
                weights = self.weights[place]
                if shape.name in weights.modules:
                    delta = weights.bt(shape).mT @ weights.a(shape) * scale * weights.modules[shape.name].scaling
                    parameter.data += delta.mT if shape.transposed else delta
        return merged(*inputs)


@pytest.fixture(scope="module", params=PATHS)
def rig(request: pytest.FixtureRequest) -> Rig:
    return Rig(request.param)


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 40])
@torch.inference_mode()
def test_without_adapters_it_is_the_models_own(rig: Rig, num_tokens: int):
    inputs = rig.inputs(num_tokens)
    torch.testing.assert_close(rig.run(inputs, []), rig.eager(*inputs), rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_every_segment_gets_its_adapter(rig: Rig):
    inputs = rig.inputs(20)
    got = rig.run(inputs, [(0, 6, 0, 1.0), (6, 9, 1, 1.0), (12, 17, 2, 1.0), (17, 19, 0, 1.0)])
    for rows, adapters in (
        (slice(0, 6), [(0, 1.0)]),
        (slice(6, 9), [(1, 1.0)]),
        (slice(9, 17), []),  # no adapter, and one that leaves these experts alone
        (slice(17, 19), [(0, 1.0)]),
        (slice(19, 20), []),
    ):
        expected = rig.expected(inputs, adapters)[rows]
        torch.testing.assert_close(got[rows], expected, rtol=1e-4, atol=1e-4)
        assert not adapters or not torch.allclose(got[rows], rig.eager(*inputs)[rows], atol=1e-2)


@torch.inference_mode()
def test_overlapping_segments_add_up(rig: Rig):
    inputs = rig.inputs(8)
    got = rig.run(inputs, [(0, 5, 0, 0.5), (0, 5, 1, -1.5)])
    torch.testing.assert_close(got[:5], rig.expected(inputs, [(0, 0.5), (1, -1.5)])[:5], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_a_row_has_the_same_bits_in_any_batch(rig: Rig):
    """Whoever its neighbours are, and whichever experts they hit."""
    x, index, weight = rig.inputs(64)
    whole = rig.run((x, index, weight), [(0, 30, 0, 1.0), (30, 50, 1, 1.0)])
    for start, end, spans in (
        (0, 1, [(0, 1, 0, 1.0)]),
        (4, 9, [(0, 5, 0, 1.0)]),
        (29, 32, [(0, 1, 0, 1.0), (1, 3, 1, 1.0)]),
        (47, 60, [(0, 3, 1, 1.0)]),
        (63, 64, []),
    ):
        part = rig.run((x[start:end], index[start:end], weight[start:end]), spans)
        assert torch.equal(part, whole[start:end]), (start, end)


def test_other_modules_are_no_experts():
    assert expert_parameters(nn.Linear(3, 4)) == ()
    assert expert_parameters(build("llama4_text").get_submodule("model.layers.0.feed_forward.experts")) == ()
