"""Leaves: norms, routers and other small modules of the base that an adapter may bring its own parameters for.

Which modules those are is measured: the model runs over a few tokens, and a leaf is a module with parameters whose one
argument and whose results have one row for every token.
"""

from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from loraplex.model.dense import RowInvariantLinear
from loraplex.model.fused import fused_norm
from loraplex.model.lora_layers import Extras, extras_in
from loraplex.model.step_context import StepContext
from loraplex.ops import Ops

_NUM_TOKENS = (5, 7)
_NUM_LOGITS = 3


class ReplaceableLeaf(nn.Module):
    """A leaf that runs again, with the adapter's parameters, on the rows of adapters that have their own.

    Its tokens lie along axes[0] of its argument and axes[1] of each of its results. A row's results are the same in
    every batch: norms work so anyway, a router's product is made to.
    """

    def __init__(self, base: nn.Module, axes: tuple[int, int], extras: Extras, context: StepContext, ops: Ops):
        super().__init__()
        self.base = base
        self._in_axis, self._out_axis = axes
        self._extras = extras
        self._context = context
        multiplies = any(parameter.ndim == 2 for parameter in base.parameters()) and not isinstance(base, nn.Embedding)
        self._products = RowInvariantLinear(ops) if multiplies else nullcontext()
        self._fused: Callable[[Tensor], Tensor] | None = fused_norm(base, ops)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # the model reads attributes of some leaves: a router's top_k, a norm's weight
            return getattr(super().__getattr__("base"), name)

    def forward(self, x: Tensor) -> Any:
        with self._products:
            y = self.base(x) if self._fused is None else self._fused(x)
            step = self._context.body
            if step is not None:
                for span, extra in extras_in(step, self._extras):
                    count = span.end - span.start
                    rows = x.narrow(self._in_axis, span.start, count)
                    own = functional_call(self.base, dict(extra.replaced), (rows,))
                    for whole, part in zip(_tensors(y), _tensors(own), strict=True):
                        whole.narrow(self._out_axis, span.start, count).copy_(part)
        return y

    def product(self, rows: Tensor) -> Tensor:
        """What a router makes of rows [M, in], for probes: its first results [M, ...]."""
        x = rows.view(*[1] * self._in_axis, *rows.shape)
        return _tensors(self(x))[0].movedim(self._out_axis, 0)


@torch.inference_mode()
def find_leaves(model: nn.Module, others: set[str]) -> dict[str, tuple[int, int]]:
    """Name of every leaf of a causal language model that is not among `others` -> the axes of its tokens, in its
    argument and in its results."""
    candidates = {
        name: module
        for name, module in model.named_modules()
        if name not in others and any(True for _ in module.parameters(recurse=False)) and not any(module.children())
    }
    seen = [_axes(model, candidates, count) for count in _NUM_TOKENS]
    common = {name: set.intersection(*(axes.get(name, set()) for axes in seen)) for name in candidates}
    return {name: axes.pop() for name, axes in common.items() if len(axes) == 1}


def _axes(model: nn.Module, candidates: dict[str, nn.Module], num_tokens: int) -> dict[str, set[tuple[int, int]]]:
    """By name the axes along which a call's argument and all its results have `num_tokens` rows. Called twice with
    different numbers, one pair remains."""
    axes: dict[str, set[tuple[int, int]]] = {}
    unfit: set[str] = set()

    def watch(name: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            if kwargs or len(args) != 1 or not isinstance(args[0], Tensor):
                unfit.add(name)
                return
            into, *out = (
                {axis for axis, size in enumerate(tensor.shape) if size == num_tokens}
                for tensor in (args[0], *_tensors(output))
            )
            found = set(product(into, set.intersection(*out))) if out else set()
            axes[name] = axes.get(name, found) & found

        return hook

    handles = [module.register_forward_hook(watch(name), with_kwargs=True) for name, module in candidates.items()]
    try:
        device = next(model.parameters()).device
        tokens = torch.arange(num_tokens, device=device).unsqueeze(0)
        model(
            input_ids=tokens,
            position_ids=tokens,
            use_cache=False,
            logits_to_keep=torch.arange(_NUM_LOGITS, device=device),
        )
    finally:
        for handle in handles:
            handle.remove()
    return {name: found for name, found in axes.items() if name not in unfit}


def _tensors(output: Any) -> list[Tensor]:
    parts = output if isinstance(output, tuple | list) else [output]
    return [part for part in parts if isinstance(part, Tensor)]
