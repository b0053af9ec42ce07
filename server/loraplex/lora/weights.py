"""LoRAWeights: one adapter in memory, as the kernels read it.

The whole adapter is one flat slab. For a module of rank r, A is stored row-major as [r, in_features] and B
transposed ("rank-major") as [r, out_features], so that expand walks contiguous rows. An embedding's A is stored as
[in_features, r], so that a token's is one row. Experts stand one after the other: A [E, r, in], Bt [E, r, out].

    slab: | A_0 | Bt_0 | A_1 | Bt_1 | gain_1 | shift_1 | ... | replaced ...     offsets index its elements

What is no delta is an `Extra` of its module, applied in this order (b: the base's bias):

    replaced  y is computed with these parameters in place of the base's   `modules_to_save`, trained token rows
    gain      y = b + gain · (y - b)     DoRA's magnitude over its norm (Liu et al. 2024, eq. 5); B carries it, too
    (the delta)
    shift     y = y + shift              `lora_bias`: scaling times the bias of B; `bias`: the trained bias less b

ΔW = scaling · B · A with scaling = alpha / r, or alpha / sqrt(r) for rsLoRA (Hu et al. 2021, eq. 3;
Kalajdzievski 2023); scaling is kept apart, not folded, so that the slab holds the file's own values.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Literal

import torch


@dataclass(frozen=True, slots=True)
class ModuleShape:
    """A module of the base that an adapter can change. `name` is its path in the transformers model; of experts, the
    path of their stacked parameter.

    kind          "linear"; "head" (the output head: its rows are those whose logits are wanted); "embedding" (the
                  input embedding: in_features is the size of its vocabulary, and the shrink is a lookup); "experts"
                  (a stack of num_experts linears); "leaf" (any other module that has parameters and works row by row,
                  a norm or a router: its parameters can be replaced)
    output_scale  what the module multiplies its output by (the embedding of some models), the delta with it
    parameters    shapes of its own parameters as the base stores them
    transposed    the base stores the weight as [in, out]
    is_tied       of a head: its weight is the input embedding's
    parts         of experts: the linears that older checkpoints keep for each expert, one after the other along the
                  outputs
    aliases       other paths that the module (of experts: the parameter) had in older checkpoints
    group         of a linear: the first of those that read the same input one after the other, itself among them
    token_axes    of a leaf: where the tokens lie in its argument and in its results
    """

    name: str
    in_features: int
    out_features: int
    kind: Literal["linear", "head", "embedding", "experts", "leaf"] = "linear"
    output_scale: float = 1.0
    parameters: Mapping[str, tuple[int, ...]] = field(default_factory=dict, hash=False)
    transposed: bool = False
    is_tied: bool = False
    num_experts: int = 1
    parts: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    token_axes: tuple[int, int] = (0, 0)
    group: str = ""


@dataclass(frozen=True, slots=True)
class ModuleDelta:
    """Where one module's A [rank, in] and Bt [rank, out] start in the slab (in elements), and its scaling. Expert e's
    are e · rank · in and e · rank · out further on. -1: the module has no such vector."""

    rank: int
    scaling: float
    offset_a: int
    offset_b: int
    offset_gain: int = -1
    offset_shift: int = -1


@dataclass(frozen=True, slots=True, eq=False)
class Replacement:
    """A parameter that the adapter brings its own of: where it starts in the slab, and its shape (of a linear or head
    [out, in], of an embedding [vocabulary, out], of a leaf as the base's). `rows` int64 [n], ascending: only these
    rows of the base's are replaced, and the shape is [n, ...]."""

    offset: int
    shape: tuple[int, ...]
    rows: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Extra:
    """What an adapter has on one module beside its delta, as views into its slab: gain and shift [out_features], the
    parameters it replaces by name, and `rows`, the only rows of "weight" that are replaced (None: all)."""

    gain: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    replaced: Mapping[str, torch.Tensor] = field(default_factory=dict)
    rows: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class LoRAWeights:
    """One adapter, read-only. `slab` is 1-D, contiguous, in the compute dtype; `modules` by module name, `replaced` by
    module name and parameter."""

    digest: str
    slab: torch.Tensor
    modules: Mapping[str, ModuleDelta]
    replaced: Mapping[str, Mapping[str, Replacement]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return self.slab.numel() * self.slab.element_size()

    @property
    def max_rank(self) -> int:
        return max((delta.rank for delta in self.modules.values()), default=0)

    @property
    def is_additive(self) -> bool:
        """Whether the adapter is deltas alone: only such can be scaled, and summed with others."""
        vectors = any(max(delta.offset_gain, delta.offset_shift) >= 0 for delta in self.modules.values())
        return not vectors and not self.replaced

    def a(self, shape: ModuleShape) -> torch.Tensor:
        """A of `shape`, a view [rank, in_features]; of an embedding [in_features, rank], of experts [E, rank, in]."""
        delta = self.modules[shape.name]
        sizes = (delta.rank, shape.in_features)
        if shape.kind == "embedding":
            sizes = sizes[::-1]
        elif shape.kind == "experts":
            sizes = (shape.num_experts, *sizes)
        return self.slab[delta.offset_a : delta.offset_a + prod(sizes)].view(sizes)

    def bt(self, shape: ModuleShape) -> torch.Tensor:
        """B transposed of `shape`, a view [rank, out_features]; of experts [E, rank, out_features]."""
        delta = self.modules[shape.name]
        sizes = (delta.rank, shape.out_features)
        if shape.kind == "experts":
            sizes = (shape.num_experts, *sizes)
        return self.slab[delta.offset_b : delta.offset_b + prod(sizes)].view(sizes)

    def extra(self, shape: ModuleShape) -> Extra | None:
        """What the adapter has on `shape` beside its delta; None: nothing."""
        delta, replaced = self.modules.get(shape.name), self.replaced.get(shape.name, {})
        gain, shift = (
            self.slab[offset : offset + shape.out_features] if offset >= 0 else None
            for offset in ((delta.offset_gain, delta.offset_shift) if delta is not None else (-1, -1))
        )
        if gain is None and shift is None and not replaced:
            return None
        tensors = {
            name: self.slab[one.offset : one.offset + prod(one.shape)].view(one.shape) for name, one in replaced.items()
        }
        rows = replaced["weight"].rows if "weight" in replaced else None
        return Extra(gain, shift, tensors, rows)


@dataclass(frozen=True, slots=True)
class LoRAPair:
    """One module's matrices as PEFT names them: a [rank, in_features], b [out_features, rank], of experts [E, rank, in]
    and [E, out, rank]; with a `gain`, b is multiplied by it already. Vectors are [out_features]. A module that has
    vectors only has rank 0."""

    shape: ModuleShape
    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    gain: torch.Tensor | None = None
    shift: torch.Tensor | None = None

    @property
    def numel(self) -> int:
        vectors = (vector for vector in (self.gain, self.shift) if vector is not None)
        return self.a.numel() + self.b.numel() + sum(vector.numel() for vector in vectors)


@dataclass(frozen=True, slots=True)
class ReplacedParameter:
    """A parameter of module `shape` as the slab is to hold it; `rows` as in `Replacement`."""

    shape: ModuleShape
    parameter: str
    tensor: torch.Tensor
    rows: torch.Tensor | None = None


def slab_numel(ranks: Iterable[tuple[ModuleShape, int]]) -> int:
    """Elements of the A and B of modules of these ranks."""
    return sum(shape.num_experts * rank * (shape.in_features + shape.out_features) for shape, rank in ranks)


SLAB_ALIGNMENT = 256
"""Bytes at whose multiples slabs begin where a device reads them: the widest loads and torch's own allocator ask for
it."""


def aligned(nbytes: int) -> int:
    """Bytes of a range for a slab of `nbytes` that others follow."""
    return -(-nbytes // SLAB_ALIGNMENT) * SLAB_ALIGNMENT


AllocateSlab = Callable[[int, torch.dtype], torch.Tensor]
"""(elements, dtype) -> an uninitialised 1-D tensor on the CPU; called in any thread."""


def allocate_slab(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """A slab of ordinary memory."""
    return torch.empty(numel, dtype=dtype)


def pack(
    digest: str,
    pairs: Iterable[LoRAPair],
    dtype: torch.dtype,
    replaced: Iterable[ReplacedParameter] = (),
    allocate: AllocateSlab = allocate_slab,
) -> LoRAWeights:
    """Copy `pairs` and `replaced` into one new slab of `dtype` (one rounding per value)."""
    pairs, replaced = list(pairs), list(replaced)
    numel = sum(pair.numel for pair in pairs) + sum(one.tensor.numel() for one in replaced)
    slab = allocate(numel, dtype)
    modules: dict[str, ModuleDelta] = {}
    replacements: dict[str, dict[str, Replacement]] = {}
    end = 0

    def put(matrix: torch.Tensor | None) -> int:
        """Append `matrix` row by row; returns where it starts, -1 for None."""
        nonlocal end
        if matrix is None:
            return -1
        start, end = end, end + matrix.numel()
        slab[start:end].view(matrix.shape).copy_(matrix)
        return start

    for pair in pairs:
        a = pair.a.T if pair.shape.kind == "embedding" else pair.a
        modules[pair.shape.name] = ModuleDelta(
            pair.a.shape[-2], pair.scaling, put(a), put(pair.b.mT), put(pair.gain), put(pair.shift)
        )
    for one in replaced:
        replacement = Replacement(put(one.tensor), tuple(one.tensor.shape), one.rows)
        replacements.setdefault(one.shape.name, {})[one.parameter] = replacement
    return LoRAWeights(digest, slab, modules, replacements)
