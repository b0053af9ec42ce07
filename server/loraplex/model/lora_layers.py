"""LoRA layers: the base's linear modules with the running step's deltas added.

y = x·Wᵀ + b, then y[segment] += scale · (x[segment]·Aᵀ)·Bᵀ. The base's parameters are never written.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loraplex.lora.weights import ModuleShape
from loraplex.model.linear import Product, make_product
from loraplex.model.step_context import StepContext
from loraplex.ops import ModulePool, Ops

# Exactly these: a subclass (a router, say) may answer something else than x·Wᵀ + b.
_LINEARS = (nn.Linear, Conv1D)

Vectors = tuple[Tensor | None, Tensor | None]
"""Gain and shift of one module in one place, [out_features] each; see `lora.weights`."""


class BaseLinear(nn.Module):
    """A Linear or Conv1D with the product chosen at load; no LoRA goes on it (lm_head)."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        weight, bias = weight_and_bias(base)
        self.out_features, self.in_features = weight.shape
        self.product: Product = make_product(weight, bias)

    @property
    def weight(self) -> Tensor:
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x.reshape(-1, self.in_features))
        return y.view(*x.shape[:-1], self.out_features)


class LoRALinear(BaseLinear):
    """A Linear or Conv1D that adds the adapters of the step. x [..., in_features] -> [..., out_features]."""

    def __init__(
        self, base: nn.Module, pool: ModulePool, vectors: Sequence[Vectors | None], context: StepContext, ops: Ops
    ):
        super().__init__(base)
        self._pool = pool
        self._vectors = vectors
        self._context = context
        self._ops = ops

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        y = self.product(rows)
        lora = self._context.lora
        if lora is not None:
            segments = self._context.vector_segments
            for start, end, place in segments:
                self._gain(y[start:end], place)
            self._ops.add_lora(y, rows, self._pool, lora)
            for start, end, place in segments:
                self._shift(y[start:end], place)
        return y.view(*x.shape[:-1], self.out_features)

    def _gain(self, y: Tensor, place: int) -> None:
        """DoRA: y = b + gain · (y - b), in place, in float32. Acts on the base's product, before the delta."""
        vectors = self._vectors[place]
        if vectors is None or vectors[0] is None:
            return
        bias = 0 if self.bias is None else self.bias.float()
        y.copy_(bias + vectors[0].float() * (y.float() - bias))

    def _shift(self, y: Tensor, place: int) -> None:
        vectors = self._vectors[place]
        if vectors is not None and vectors[1] is not None:
            y.add_(vectors[1])


def base_of(module: nn.Module) -> nn.Module:
    """The base's own module, wrapped or not."""
    return module.base if isinstance(module, BaseLinear) else module


def weight_and_bias(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The weight as [out, in] and the bias. Conv1D stores [in, out]."""
    if isinstance(module, Conv1D):
        return module.weight.T, module.bias
    assert isinstance(module, nn.Linear)
    return module.weight, module.bias


def lora_targets(model: nn.Module) -> dict[str, ModuleShape]:
    """Every module of the base that can carry a LoRA: all Linear and Conv1D but the output head."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    targets = {}
    for name, module in model.named_modules():
        if type(module) in _LINEARS and module is not head:
            out_features, in_features = weight_and_bias(module)[0].shape
            targets[name] = ModuleShape(name, in_features, out_features)
    return targets


def wrap_linears(
    model: nn.Module,
    pools: Mapping[str, ModulePool],
    vectors: Mapping[str, Sequence[Vectors | None]],
    context: StepContext,
    ops: Ops,
) -> None:
    """Replace every module in `pools` by a LoRALinear, and every other linear by a BaseLinear, in place."""
    for name, module in list(model.named_modules()):
        if type(module) in _LINEARS:
            pool = pools.get(name)
            layer = BaseLinear(module) if pool is None else LoRALinear(module, pool, vectors[name], context, ops)
            parent_name, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent_name), attribute, layer)
