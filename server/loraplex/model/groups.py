"""Groups: linears of one module that read the same input (q, k, v; gate, up) and are computed as one product.

Which they are is measured: the model runs over a few tokens, and those that are called one after the other with the
very same tensor form a group. The first of a group that is called computes all; the others find their part.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from loraplex.model.linear import Product, make_product, weight_rows

_NUM_TOKENS = 5


class GroupProduct:
    """One product for several weights [out_i, in]: x [M, in] -> their outputs, views [M, out_i] of one tensor.

    `adapt`: what is done to the whole tensor y [M, Σ out_i], in place, for the rows x, as soon as it is computed.
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]):
        self._sizes = [len(weight) for weight in weights]
        bias = None
        if any(one is not None for one in biases):
            zeros = (weight.new_zeros(len(weight)) for weight in weights)
            bias = torch.cat([zero if one is None else one for one, zero in zip(biases, zeros, strict=True)])
        self.product: Product = make_product(torch.cat(list(weights)), bias)
        self.adapt: Callable[[Tensor, Tensor], None] | None = None
        self._input: Tensor | None = None
        self._left: list[Tensor | None] = []

    def weight(self, index: int) -> Tensor:
        """The weight of member `index`, [out, in]."""
        return self.product.weight().split(self._sizes)[index]

    def rows(self, index: int, runs: Sequence[tuple[int, int]]) -> Tensor:
        """Rows of the weight of member `index`."""
        before = sum(self._sizes[:index])
        return weight_rows(self.product, [(before + start, before + stop) for start, stop in runs])

    def output(self, index: int, x: Tensor, rows: Tensor) -> Tensor:
        """The output of member `index` for the input x, whose rows are `rows`. What a member leaves behind for another
        input is forgotten: an input is known by being the very same tensor, which is held until all have come."""
        if self._input is not x or self._left[index] is None:
            whole = self.product(rows)
            if self.adapt is not None:
                self.adapt(whole, rows)
            self._input, self._left = x, list(whole.split(self._sizes, dim=1))
        found, self._left[index] = self._left[index], None
        assert found is not None, "it was computed just now"
        if not any(part is not None for part in self._left):
            self._input = None
        return found


class Way(Protocol):
    """How the product of one linear is computed."""

    @property
    def product(self) -> Product:
        """What is run: the linear's own product, or its group's."""
        ...

    def weight(self) -> Tensor:
        """The linear's weight [out, in]."""
        ...

    def rows(self, runs: Sequence[tuple[int, int]]) -> Tensor:
        """Its rows start:stop for each of `runs`, [rows, in]."""
        ...

    def multiply(self, x: Tensor, rows: Tensor) -> Tensor:
        """rows·Wᵀ + b [M, out], to be written to, for an input x whose rows are `rows` [M, in]."""
        ...


@dataclass(frozen=True, slots=True)
class Alone:
    """A linear with a product of its own."""

    product: Product

    def weight(self) -> Tensor:
        return self.product.weight()

    def rows(self, runs: Sequence[tuple[int, int]]) -> Tensor:
        return weight_rows(self.product, runs)

    def multiply(self, x: Tensor, rows: Tensor) -> Tensor:
        return self.product(rows)


@dataclass(frozen=True, slots=True)
class Member:
    """A linear that is a part of a group's product."""

    group: GroupProduct
    index: int

    @property
    def product(self) -> Product:
        return self.group.product

    def weight(self) -> Tensor:
        return self.group.weight(self.index)

    def rows(self, runs: Sequence[tuple[int, int]]) -> Tensor:
        return self.group.rows(self.index, runs)

    def multiply(self, x: Tensor, rows: Tensor) -> Tensor:
        return self.group.output(self.index, x, rows)


@torch.inference_mode()
def find_groups(model: nn.Module, linears: Sequence[str]) -> list[tuple[str, ...]]:
    """Names of the `linears` that read the same tensor, group by group, for a causal language model. None when the
    model cannot work with outputs that are views of a wider tensor, as a group's are."""
    calls: list[tuple[str, Tensor]] = []

    def watch(name: str):
        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            calls.append((name, args[0]))
            wide = output.new_empty(*output.shape[:-1], output.shape[-1] + 16)
            return wide[..., : output.shape[-1]].copy_(output)

        return hook

    handles = [model.get_submodule(name).register_forward_hook(watch(name)) for name in linears]
    try:
        tokens = torch.arange(_NUM_TOKENS, device=next(model.parameters()).device).unsqueeze(0)
        model(input_ids=tokens, position_ids=tokens, use_cache=False)
    except RuntimeError:  # a view of the output that only a contiguous tensor has
        return []
    finally:
        for handle in handles:
            handle.remove()
    groups: list[list[str]] = []
    last: Tensor | None = None
    for name, x in calls:
        parent = name.rpartition(".")[0]
        if last is x and groups[-1][0].rpartition(".")[0] == parent and name not in groups[-1]:
            groups[-1].append(name)
        else:
            groups.append([name])
        last = x
    names = [name for group in groups for name in group]
    return [tuple(group) for group in groups if len(group) > 1 and all(names.count(name) == 1 for name in group)]
