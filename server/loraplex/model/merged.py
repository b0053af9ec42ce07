"""Merged weights: W′ = W + s·B·A of one adapter, a second set beside the base's for steps that are all its own.

Computed in float32 and rounded once, packed as the base is. Nothing is subtracted and nothing restored: the base's
weights are read and never written. An adapter on one linear of a group takes a copy of the whole group's weight; one on
a tied head or embedding unties them in its set alone.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loraplex.lora.weights import LoRAWeights, ModuleShape
from loraplex.model.dense import StackedProduct
from loraplex.model.experts import LoRAExperts
from loraplex.model.groups import Alone, GroupProduct, Member, Way
from loraplex.model.linear import make_product
from loraplex.model.loader import BaseModel
from loraplex.model.lora_layers import LoRAEmbedding, LoRALinear, weight_and_bias
from loraplex.model.targets import base_of
from loraplex.ops import Ops

_CHUNK = 1 << 22  # numbers that stand in float32 at a time


class NotFinite(ArithmeticError):
    """A merged weight is beyond the largest number of its dtype."""


@dataclass(frozen=True, slots=True, eq=False)
class MergedWeights:
    """`linears`, `embeddings` and `experts` by module name. `error`: ‖(W′ - W) - ΔW‖ / ‖ΔW‖ over all of them, what the
    one rounding takes from the delta (Frobenius norms). `nbytes`: what the set occupies."""

    digest: str
    linears: Mapping[str, Way]
    embeddings: Mapping[str, Tensor]
    experts: Mapping[str, Mapping[str, StackedProduct]]
    error: float
    nbytes: int

    def install(self, model: nn.Module) -> None:
        """Let the layers find the set under its adapter's digest."""
        for table, own in self._tables(model):
            table[self.digest] = own

    def remove(self, model: nn.Module) -> None:
        for table, _ in self._tables(model):
            table.pop(self.digest, None)

    def _tables(self, model: nn.Module) -> Iterator[tuple[dict[str | None, Any], Any]]:
        """The layers' own tables by adapter, and what of this set belongs there."""
        for own in (self.linears, self.embeddings, self.experts):
            for name, value in own.items():
                layer = model.get_submodule(name)
                assert isinstance(layer, LoRALinear | LoRAEmbedding | LoRAExperts)
                yield layer.merged, value


def merged_nbytes(base: BaseModel, weights: LoRAWeights) -> int:
    """Bytes of the set that `merge` would make."""
    changed = _changed(base, weights)
    numbers = (shape.num_experts * shape.in_features * shape.out_features for shape in changed)
    return sum(numbers) * weights.slab.element_size()


@torch.inference_mode()
def merge(
    base: BaseModel, weights: LoRAWeights, ops: Ops, on_module: Callable[[int, int], object] = lambda done, all: None
) -> MergedWeights:
    """The set of an adapter that is deltas alone, for a base whose modules are wrapped. `on_module(done, all)` is
    called before each module; what it raises ends the work. Raises NotFinite."""
    assert weights.is_additive
    work = _Work(base, weights)
    shapes = _changed(base, weights)
    linears: dict[str, Way] = {}
    embeddings: dict[str, Tensor] = {}
    stacks: dict[str, dict[str, Tensor]] = {}
    members: dict[int, list[tuple[str, Member, Tensor]]] = {}
    for done, shape in enumerate(shapes):
        on_module(done, len(shapes))
        name = shape.name
        if shape.kind == "experts":
            path, _, parameter = name.rpartition(".")
            stacks.setdefault(path, {})[parameter] = work.experts(shape)
        elif shape.kind == "embedding":
            embeddings[name] = work.embedding(shape)
        else:
            layer = base.model.get_submodule(name)
            assert isinstance(layer, LoRALinear)
            weight = work.linear(shape, layer)
            if isinstance(layer.way, Member):
                members.setdefault(id(layer.way.group), []).append((name, layer.way, weight))
            else:
                linears[name] = Alone(make_product(weight, weight_and_bias(layer.base)[1]))
    for parts in members.values():
        parts.sort(key=lambda part: part[1].index)
        biases = [weight_and_bias(base_of(base.model.get_submodule(name)))[1] for name, _, _ in parts]
        group = GroupProduct([weight for _, _, weight in parts], biases)
        linears |= {name: Member(group, member.index) for name, member, _ in parts}
    return MergedWeights(
        weights.digest,
        linears,
        embeddings,
        _products(base, stacks, ops),
        work.error,
        merged_nbytes(base, weights),
    )


def _changed(base: BaseModel, weights: LoRAWeights) -> list[ModuleShape]:
    """The modules that the set holds: those with a delta, and those that are computed in one product with one."""
    ways = {
        name: layer.way
        for name, shape in base.targets.items()
        if shape.kind in ("linear", "head") and isinstance(layer := base.model.get_submodule(name), LoRALinear)
    }
    groups = {way.group for name, way in ways.items() if isinstance(way, Member) and name in weights.modules}
    return [
        shape
        for name, shape in base.targets.items()
        if name in weights.modules or (isinstance(way := ways.get(name), Member) and way.group in groups)
    ]


def _products(
    base: BaseModel, stacks: Mapping[str, Mapping[str, Tensor]], ops: Ops
) -> dict[str, dict[str, StackedProduct]]:
    """Of every module of experts that has a merged stack, the products of all its stacks."""
    found = {}
    for path, merged in stacks.items():
        layer = base.model.get_submodule(path)
        assert isinstance(layer, LoRAExperts)
        found[path] = layer.products_of(merged, ops)
    return found


class _Work:
    """Sums W + ΔW in float32, and what rounding takes from it."""

    def __init__(self, base: BaseModel, weights: LoRAWeights):
        self._base = base
        self._weights = weights
        self._lost = self._whole = 0.0  # ‖(W′ - W) - ΔW‖² and ‖ΔW‖²

    @property
    def error(self) -> float:
        return (self._lost / self._whole) ** 0.5 if self._whole else 0.0

    def linear(self, shape: ModuleShape, layer: LoRALinear) -> Tensor:
        """[out, in]; of a linear without a delta, the base's."""
        weight = layer.way.weight()
        delta = self._weights.modules.get(shape.name)
        if delta is None:
            return weight
        return self._add(weight, self._weights.bt(shape).T, self._weights.a(shape), delta.scaling)

    def embedding(self, shape: ModuleShape) -> Tensor:
        """[vocabulary, out]: the module multiplies its rows by its scale itself."""
        layer = self._base.model.get_submodule(shape.name)
        assert isinstance(layer, LoRAEmbedding)
        scaling = self._weights.modules[shape.name].scaling / shape.output_scale
        return self._add(layer.weight, self._weights.a(shape), self._weights.bt(shape), scaling)

    def experts(self, shape: ModuleShape) -> Tensor:
        """[E, out, in], or [E, in, out] as the base stores it."""
        stack = self._base.tensor_of(shape.name)
        scaling = self._weights.modules[shape.name].scaling
        merged = torch.empty_like(stack)
        for expert, (weight, a, bt) in enumerate(
            zip(stack, self._weights.a(shape), self._weights.bt(shape), strict=True)
        ):
            left, right = (a.T, bt) if shape.transposed else (bt.T, a)
            merged[expert] = self._add(weight, left, right, scaling)
        return merged

    def _add(self, weight: Tensor, left: Tensor, right: Tensor, scaling: float) -> Tensor:
        """weight [N, M] + scaling · left [N, r] · right [r, M], rounded to the weight's dtype."""
        merged = torch.empty_like(weight, memory_format=torch.contiguous_format)
        left, right = left.to(weight.device).float() * scaling, right.to(weight.device).float()
        step = max(1, _CHUNK // weight.shape[1])
        for start in range(0, len(weight), step):
            rows = slice(start, start + step)
            before = weight[rows].float()
            delta = left[rows] @ right
            merged[rows] = (before + delta).to(weight.dtype)
            after = merged[rows].float()
            if not bool(after.isfinite().all()):
                raise NotFinite(f"W + s·B·A is beyond the largest {weight.dtype} number".replace("torch.", ""))
            self._lost += float((after - before - delta).square().sum(dtype=torch.float64))
            self._whole += float(delta.square().sum(dtype=torch.float64))
        return merged
