"""LoRA layers: the base's linear modules, embedding and head with the running step's adapters.

y = x·Wᵀ + b, then y[segment] += scale · (x[segment]·Aᵀ)·Bᵀ, with an adapter's extras (see `lora.weights`) before and
after. The base's parameters are never written.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from loraplex.lora.weights import Extra
from loraplex.model.dense import multiply
from loraplex.model.groups import Alone, Member, Way
from loraplex.model.linear import is_packed, make_product
from loraplex.model.quantization import QuantizedProduct, is_quantized
from loraplex.model.step_context import Span, StepContext, StepLoRA
from loraplex.ops import LoRASegments, ModuleGroup, ModulePool, Ops

Extras = Sequence[Extra | None]
"""What the adapter in each place has on one module beside its delta."""


class BaseLinear(nn.Module):
    """The base's part of a Linear or Conv1D: its product, chosen at load, or its part of a group's.

    What a product has packed it alone holds: the module's own weight is but NaNs then (`let_go_of_weight`), and
    `whole_weight` is the way to its numbers; to a quantised one's, too.
    """

    def __init__(self, base: nn.Module, member: Member | None = None):
        super().__init__()
        self.base = base
        self.out_features, self.in_features = sizes_of(base)
        self._is_whole = False
        if member is not None:
            self.way: Way = member
        elif is_quantized(base):
            self.way = Alone(QuantizedProduct(base))
        else:
            weight, bias = weight_and_bias(base)
            self.way = Alone(make_product(weight, bias))
            self._is_whole = not is_packed(weight)
            if not self._is_whole:
                let_go_of_weight(base)

    @property
    def weight(self) -> Tensor:
        """The parameter, for its shape and dtype."""
        return self.base.weight  # type: ignore[return-value]

    def whole_weight(self) -> Tensor:
        """The weight as the base stores it, unpacked or dequantised if need be."""
        if self._is_whole:
            return self.weight
        weight = self.way.weight()
        return weight.T if isinstance(self.base, Conv1D) else weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        return self.way.multiply(x, x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)


class LoRALinear(BaseLinear):
    """A Linear or Conv1D that adds the adapters of the step. x [..., in_features] -> [..., out_features].

    `merged`: by adapter, the way of a step that runs on merged weights; one without a delta here has none.
    """

    def __init__(
        self,
        base: nn.Module,
        pool: ModulePool,
        extras: Extras,
        context: StepContext,
        ops: Ops,
        member: Member | None = None,
    ):
        super().__init__(base, member)
        self.merged: dict[str | None, Way] = {}
        self._is_adapted_in_group = member is not None and member.group.adapt is not None
        self._pool = pool
        self._extras = extras
        self._context = context
        self._ops = ops

    @property
    def _step(self) -> StepLoRA | None:
        return self._context.body

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        y = self.merged.get(self._context.merged, self.way).multiply(x, rows)
        step = self._step
        if step is not None:
            for span, extra in extras_in(step, self._extras):
                self._replace(y[span.start : span.end], rows[span.start : span.end], extra)
                self._gain(y[span.start : span.end], extra)
            if not self._is_adapted_in_group or step.extra_spans:
                self._ops.add_lora(y, rows, self._pool, step.segments)
            for span, extra in extras_in(step, self._extras):
                if extra.shift is not None:
                    y[span.start : span.end].add_(extra.shift)
        return y.view(*x.shape[:-1], self.out_features)

    def _replace(self, y: Tensor, x: Tensor, extra: Extra) -> None:
        """y = x·Wᵀ + b with the adapter's own W, or only its own rows of it, in place."""
        weight = extra.replaced.get("weight")
        if weight is None:
            return
        product = multiply(self._ops, x, weight)
        bias = None if self.bias is None else self.bias.float()
        if extra.rows is None:
            y.copy_(product if bias is None else product + bias)
        else:
            y[:, extra.rows] = (product if bias is None else product + bias[extra.rows]).to(y.dtype)

    def _gain(self, y: Tensor, extra: Extra) -> None:
        """DoRA: y = b + gain · (y - b), in place, in float32. Acts on the base's product, before the delta."""
        if extra.gain is not None:
            bias = 0 if self.bias is None else self.bias.float()
            y.copy_(bias + extra.gain.float() * (y.float() - bias))


class GroupDeltas:
    """The deltas of all linears of a group at once, on the tensor that holds their outputs side by side. Not in a step
    with an adapter that is more than deltas: a gain comes before the delta, so each linear then adds its own."""

    def __init__(self, pools: Sequence[ModulePool], context: StepContext, ops: Ops):
        self._group = ModuleGroup(pools)
        self._context = context
        self._add: Callable[[Tensor, Tensor, ModuleGroup, LoRASegments], None] = ops.add_lora_group  # type: ignore[attr-defined]

    def __call__(self, y: Tensor, x: Tensor) -> None:
        step = self._context.body
        if step is not None and not step.extra_spans:
            self._add(y, x, self._group, step.segments)


class LoRAHead(LoRALinear):
    """The output head: its rows are those whose logits are wanted, so its segments are others."""

    @property
    def _step(self) -> StepLoRA | None:
        return self._context.head


class LoRAEmbedding(nn.Module):
    """The input embedding: the shrink is a lookup, s[t] = A[token t], and the expand is everybody's. `scale`: what the
    base's module multiplies its rows by."""

    def __init__(
        self, base: nn.Embedding, scale: float, pool: ModulePool, extras: Extras, context: StepContext, ops: Ops
    ):
        super().__init__()
        self.base = base
        self.merged: dict[str | None, Tensor] = {}  # by adapter, the weight of a step on merged weights
        self._scale = scale
        self._pool = pool
        self._extras = extras
        self._context = context
        self._ops = ops

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, token_ids: Tensor) -> Tensor:
        """token_ids int64 [1, T] -> [1, T, out_features]."""
        merged = self.merged.get(self._context.merged)
        if merged is not None:
            return functional_call(self.base, {"weight": merged}, (token_ids,))
        y = self.base(token_ids)
        step = self._context.body
        if step is not None:
            rows, tokens = y.view(-1, self._pool.out_features), token_ids.reshape(-1)
            for span, extra in extras_in(step, self._extras):
                self._replace(rows[span.start : span.end], tokens[span.start : span.end], extra)
                if extra.gain is not None:
                    part = rows[span.start : span.end]
                    part.copy_(extra.gain.float() * part.float())
            if any(self._pool.rank[span.place] for span in step.spans):
                self._ops.expand(rows, self._look_up(tokens, step), self._pool, step.segments)
        return y

    def _replace(self, y: Tensor, token_ids: Tensor, extra: Extra) -> None:
        """The rows of tokens that the adapter has its own of, in place."""
        weight = extra.replaced.get("weight")
        if weight is None:
            return
        at = token_ids
        if extra.rows is not None:
            at = torch.searchsorted(extra.rows, token_ids).clamp_(max=len(extra.rows) - 1)
        found = weight[at]
        if self._scale != 1.0:  # rounded as the base's own module rounds it
            found = found * torch.tensor(self._scale, device=found.device).to(found.dtype)
        if extra.rows is not None:
            is_own = extra.rows[at] == token_ids
            found = torch.where(is_own.unsqueeze(1), found, y)
        y.copy_(found)

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


def extras_in(step: StepLoRA, extras: Extras) -> Iterator[tuple[Span, Extra]]:
    """The spans of the step whose adapter has something beside its delta on a module, and what."""
    for span in step.extra_spans:
        extra = extras[span.place]
        if extra is not None:
            yield span, extra


def let_go_of_weight(module: nn.Module) -> None:
    """Leave the shape and the dtype of a Linear's or Conv1D's weight, its numbers being elsewhere. Whoever still reads
    it reads NaN, and no memory is behind it."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    module.weight = nn.Parameter(weight.new_full((), torch.nan).expand(weight.shape), requires_grad=False)


def sizes_of(module: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a Linear, quantised or not, or a Conv1D."""
    if isinstance(module, Conv1D):
        return module.weight.shape[1], module.weight.shape[0]
    assert isinstance(module, nn.Linear)
    return module.out_features, module.in_features


def weight_and_bias(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The weight as [out, in] and the bias, of a module that is not quantised. Conv1D stores [in, out]."""
    if isinstance(module, Conv1D):
        return module.weight.T, module.bias
    assert isinstance(module, nn.Linear)
    return module.weight, module.bias
