"""LoRA layers: the base's linear modules, embedding and head with the running step's deltas added.

y = x·Wᵀ + b, then y[segment] += scale · (x[segment]·Aᵀ)·Bᵀ. The base's parameters are never written.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loraplex.lora.weights import ModuleShape
from loraplex.model.linear import Product, make_product
from loraplex.model.step_context import StepContext, StepLoRA
from loraplex.ops import ModulePool, Ops

# Exactly these: a subclass (a router, say) may answer something else than x·Wᵀ + b.
_LINEARS = (nn.Linear, Conv1D)

Vectors = tuple[Tensor | None, Tensor | None]
"""Gain and shift of one module in one place, [out_features] each; see `lora.weights`."""


class BaseLinear(nn.Module):
    """The base's part of a Linear or Conv1D: its product, chosen at load."""

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

    @property
    def _step(self) -> StepLoRA | None:
        return self._context.body

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        y = self.product(rows)
        step = self._step
        if step is not None:
            for start, end, place in step.vector_segments:
                self._gain(y[start:end], place)
            self._ops.add_lora(y, rows, self._pool, step.segments)
            for start, end, place in step.vector_segments:
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


class LoRAHead(LoRALinear):
    """The output head: its rows are those whose logits are wanted, so its segments are others."""

    @property
    def _step(self) -> StepLoRA | None:
        return self._context.head


class LoRAEmbedding(nn.Module):
    """The input embedding: the shrink is a lookup, s[t] = A[token t], and the expand is everybody's."""

    def __init__(self, base: nn.Embedding, pool: ModulePool, context: StepContext, ops: Ops):
        super().__init__()
        self.base = base
        self._pool = pool
        self._context = context
        self._ops = ops

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, token_ids: Tensor) -> Tensor:
        """token_ids int64 [1, T] -> [1, T, out_features]."""
        y = self.base(token_ids)
        step = self._context.body
        if step is not None and any(self._pool.rank[span.place] for span in step.spans):
            shrunk = self._look_up(token_ids.reshape(-1), step)
            self._ops.expand(y.view(-1, self._pool.out_features), shrunk, self._pool, step.segments)
        return y

    def _look_up(self, token_ids: Tensor, step: StepLoRA) -> Tensor:
        """float32 [num_rows, max_rank]: each segment's rows of its adapter's A."""
        segments = step.segments
        shrunk = torch.zeros(segments.num_rows, segments.max_rank, dtype=torch.float32, device=token_ids.device)
        for span in step.spans:
            rank, slab = int(self._pool.rank[span.place]), self._pool.slabs[span.place]
            if rank and slab is not None:
                start = int(self._pool.offset_a[span.place])
                rows = slab[start : start + rank * self._pool.in_features].view(-1, rank)
                count = span.end - span.start
                shrunk[span.offset : span.offset + count, :rank] = rows[token_ids[span.start : span.end]].float()
        return shrunk


def base_of(module: nn.Module) -> nn.Module:
    """The base's own module, wrapped or not."""
    return module.base if isinstance(module, BaseLinear | LoRAEmbedding) else module


def weight_and_bias(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The weight as [out, in] and the bias. Conv1D stores [in, out]."""
    if isinstance(module, Conv1D):
        return module.weight.T, module.bias
    assert isinstance(module, nn.Linear)
    return module.weight, module.bias


def lora_targets(model: nn.Module) -> dict[str, ModuleShape]:
    """Every module of the base that can carry a LoRA: Linear, Conv1D, the input embedding and the output head."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    targets = {}
    for name, module in model.named_modules():
        if type(module) in _LINEARS:
            out_features, in_features = weight_and_bias(module)[0].shape
            targets[name] = ModuleShape(name, in_features, out_features, "head" if module is head else "linear")
        elif module is embedding and isinstance(module, nn.Embedding):
            scale = float(getattr(module, "embed_scale", 1.0))
            targets[name] = ModuleShape(name, module.num_embeddings, module.embedding_dim, "embedding", scale)
    return targets


def wrap_modules(
    model: nn.Module,
    targets: Mapping[str, ModuleShape],
    pools: Mapping[str, ModulePool],
    vectors: Mapping[str, Sequence[Vectors | None]],
    context: StepContext,
    ops: Ops,
) -> None:
    """Replace every target by its LoRA layer, in place; all linears are targets (`lora_targets`)."""
    for name, shape in targets.items():
        module = model.get_submodule(name)
        if shape.kind == "embedding":
            assert isinstance(module, nn.Embedding)
            layer: nn.Module = LoRAEmbedding(module, pools[name], context, ops)
        else:
            layer_class = LoRAHead if shape.kind == "head" else LoRALinear
            layer = layer_class(module, pools[name], vectors[name], context, ops)
        parent_name, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent_name), attribute, layer)
