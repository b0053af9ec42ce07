"""LoRAExperts: a stack of experts (MoE) with the running step's adapters on each expert's linears.

Every token goes to its top K experts. The S = T·K pairs of token and expert are sorted by expert and segment, so that
each expert is one product over its rows, and each (expert, segment) one segment of the LoRA kernels. An adapter's
places are counted by expert: place · E + e.

The arithmetic is that of transformers' own experts (`integrations/moe.py`, `batched_mm_experts_forward`), without its
copy of a weight for every row, and the same for a row in every batch (see `dense`).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from loraplex.model.dense import StackedProduct
from loraplex.model.step_context import Span, StepContext, StepLoRA
from loraplex.ops import LoRASegments, ModulePool, Ops


def expert_parameters(module: nn.Module) -> tuple[str, ...]:
    """Names of the stacked weights of a module of experts, first the one that reads the hidden states; empty for any
    other module. (transformers marks its experts so: `use_experts_implementation`.)"""
    if not all(hasattr(module, mark) for mark in ("num_experts", "is_transposed", "has_gate", "has_bias")):
        return ()
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    return names if all(getattr(getattr(module, name, None), "ndim", 0) == 3 for name in names) else ()


@dataclass(frozen=True, slots=True)
class _Rows:
    """The pairs in sorted order: `order[s]` is the pair, `token[s]` its token, `expert[s]` its expert; `experts`
    (e, start, end) are the runs of one."""

    order: Tensor
    token: Tensor
    expert: Tensor
    experts: tuple[tuple[int, int, int], ...]
    lora: LoRASegments | None


class LoRAExperts(nn.Module):
    """hidden states [T, H], top_k_index int64 [T, K], top_k_weights [T, K] -> [T, H]. `pools` by parameter."""

    def __init__(self, base: nn.Module, pools: Mapping[str, ModulePool], context: StepContext, ops: Ops):
        super().__init__()
        self.base = base
        self._names = expert_parameters(base)
        self._products = self.products_of({}, ops)
        self.merged: dict[str | None, Mapping[str, StackedProduct]] = {}  # by adapter, its merged weights' products
        self._pools = pools
        self._context = context
        self._ops = ops

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        base = self.base
        num_tokens, top_k = top_k_index.shape
        rows = self._sort(top_k_index)
        first, second = self._names
        y = self._project(first, hidden_states[rows.token], rows)
        y = base._apply_gate(y) if base.has_gate else base.act_fn(y)  # type: ignore[operator]
        y = self._project(second, y.contiguous(), rows)
        if base.has_post_expert_norm:
            y = base.post_expert_norm(y)  # type: ignore[operator]
        y = y * top_k_weights.reshape(-1)[rows.order].unsqueeze(-1)
        unsorted = torch.empty_like(y)
        unsorted[rows.order] = y
        return unsorted.view(num_tokens, top_k, -1).sum(dim=1).to(hidden_states.dtype)

    def products_of(self, stacks: Mapping[str, Tensor], ops: Ops) -> dict[str, StackedProduct]:
        """The products of all parameters, of those in `stacks` by other weights than the base's."""
        is_transposed = bool(self.base.is_transposed)
        return {
            name: StackedProduct(ops, stacks.get(name, getattr(self.base, name)), is_transposed) for name in self._names
        }

    def products(self) -> Iterator[tuple[Callable[[Tensor], Tensor], tuple[int, int]]]:
        """The first expert's products [M, in] -> [M, out] and (in, out), for probes."""
        for product in self._products.values():
            sizes = (product.in_features, product.out_features)
            yield (lambda x, product=product: product(x, [(0, 0, len(x))])), sizes

    def _project(self, name: str, x: Tensor, rows: _Rows) -> Tensor:
        """x [S, in] -> [S, out], each row by its expert, with its adapter's delta."""
        y = self.merged.get(self._context.merged, self._products)[name](x, rows.experts)
        if self.base.has_bias:
            y += getattr(self.base, f"{name}_bias")[rows.expert]
        if rows.lora is not None:
            self._ops.add_lora(y, x, self._pools[name], rows.lora)
        return y

    def _sort(self, top_k_index: Tensor) -> _Rows:
        step = self._context.body
        num_tokens, top_k = top_k_index.shape
        segment_of, spans_of = _ranges(step, num_tokens)
        expert = top_k_index.reshape(-1).cpu().numpy()
        token = np.repeat(np.arange(num_tokens), top_k)
        segment = segment_of[token]
        order = np.lexsort((segment, expert))
        expert, segment = expert[order], segment[order]
        bounds = _bounds(expert)
        experts = tuple((int(expert[s]), s, e) for s, e in zip(bounds, bounds[1:], strict=False))
        lora = None
        if step is not None and self._is_adapted(step):
            bounds = _bounds(expert * len(spans_of) + segment)
            runs = [(int(expert[s]), spans_of[segment[s]], s, e) for s, e in zip(bounds, bounds[1:], strict=False)]
            lora = self._segments(runs, top_k_index.device)
        pairs, tokens, of_pair = (
            torch.from_numpy(part).to(top_k_index.device) for part in (order, token[order], expert)
        )
        return _Rows(pairs, tokens, of_pair, experts, lora)

    def _is_adapted(self, step: StepLoRA) -> bool:
        first = [span.place * self.base.num_experts for span in step.spans]  # type: ignore[operator]
        return any(bool(pool.rank[first].any()) for pool in self._pools.values())

    def _segments(self, runs: list[tuple[int, list[Span], int, int]], device: torch.device) -> LoRASegments | None:
        num_experts: int = self.base.num_experts  # type: ignore[assignment]
        columns = [
            (start, end, span.place * num_experts + expert, span.scale)
            for expert, spans, start, end in runs
            for span in spans
        ]
        if not columns:
            return None
        start, end, place, scale = zip(*columns, strict=True)
        lengths = np.subtract(end, start)
        offset = np.cumsum(lengths) - lengths
        places = list(place)
        return LoRASegments(
            torch.tensor(start, dtype=torch.int32, device=device),
            torch.tensor(end, dtype=torch.int32, device=device),
            torch.tensor(place, dtype=torch.int32, device=device),
            torch.tensor(scale, dtype=torch.float32, device=device),
            torch.from_numpy(offset.astype(np.int32)).to(device),
            int(lengths.sum()),
            max(int(pool.rank[places].max()) for pool in self._pools.values()),
        )


def _ranges(step: StepLoRA | None, num_tokens: int) -> tuple[np.ndarray, list[list[Span]]]:
    """Which range of rows each token is in, int64 [T], and the spans of each; range 0 is the base's, without spans."""
    segment_of = np.zeros(num_tokens, np.int64)
    spans_of: list[list[Span]] = [[]]
    index: dict[tuple[int, int], int] = {}
    for span in step.spans if step is not None else ():
        key = (span.start, span.end)
        if key not in index:
            index[key] = len(spans_of)
            spans_of.append([])
            segment_of[span.start : span.end] = index[key]
        spans_of[index[key]].append(span)
    return segment_of, spans_of


def _bounds(values: np.ndarray) -> list[int]:
    """Where runs of equal values start, and the end of the last."""
    return [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
