"""LoRAWeights: one adapter in memory, as the kernels read it.

The whole adapter is one flat slab. For a module of rank r, A is stored row-major as [r, in_features] and B
transposed ("rank-major") as [r, out_features], so that expand walks contiguous rows. An embedding's A is stored as
[in_features, r], so that a token's is one row.

    slab: | A_0 | Bt_0 | A_1 | Bt_1 | gain_1 | shift_1 | ...     ModuleDelta's offsets index its elements

What is no delta is kept as vectors of a module, [out_features] each, applied in this order (b: the base's bias):

    gain    y = b + gain · (y - b)     DoRA's magnitude over its norm (Liu et al. 2024, eq. 5); B carries it, too
    shift   y = y + shift              `lora_bias`: scaling times the bias of B

ΔW = scaling · B · A with scaling = alpha / r, or alpha / sqrt(r) for rsLoRA (Hu et al. 2021, eq. 3;
Kalajdzievski 2023); scaling is kept apart, not folded, so that the slab holds the file's own values.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True, slots=True)
class ModuleShape:
    """A module of the base that can carry a LoRA. `name` is its path in the transformers model.

    kind          "linear"; "head" (the output head: its rows are those whose logits are wanted); "embedding" (the
                  input embedding: in_features is the size of its vocabulary, and the shrink is a lookup)
    output_scale  what the module multiplies its output by (the embedding of some models), the delta with it
    """

    name: str
    in_features: int
    out_features: int
    kind: Literal["linear", "head", "embedding"] = "linear"
    output_scale: float = 1.0


@dataclass(frozen=True, slots=True)
class ModuleDelta:
    """Where one module's A [rank, in] and Bt [rank, out] start in the slab (in elements), and its scaling.
    -1: the module has no such vector."""

    rank: int
    scaling: float
    offset_a: int
    offset_b: int
    offset_gain: int = -1
    offset_shift: int = -1


@dataclass(frozen=True, slots=True, eq=False)
class LoRAWeights:
    """One adapter, read-only. `slab` is 1-D, contiguous, in the compute dtype; `modules` by module name."""

    digest: str
    slab: torch.Tensor
    modules: Mapping[str, ModuleDelta]

    @property
    def nbytes(self) -> int:
        return self.slab.numel() * self.slab.element_size()

    @property
    def max_rank(self) -> int:
        return max((delta.rank for delta in self.modules.values()), default=0)

    @property
    def has_vectors(self) -> bool:
        """Whether any module has a gain or a shift beside its delta."""
        return any(max(delta.offset_gain, delta.offset_shift) >= 0 for delta in self.modules.values())

    def a(self, shape: ModuleShape) -> torch.Tensor:
        """A of `shape`, a view [rank, in_features]; of an embedding [in_features, rank]."""
        delta = self.modules[shape.name]
        matrix = self.slab[delta.offset_a : delta.offset_a + delta.rank * shape.in_features]
        if shape.kind == "embedding":
            return matrix.view(shape.in_features, delta.rank)
        return matrix.view(delta.rank, shape.in_features)

    def vectors(self, shape: ModuleShape) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Gain and shift of `shape`, views [out_features], None where it has none."""
        delta = self.modules[shape.name]
        gain, shift = (
            self.slab[offset : offset + shape.out_features] if offset >= 0 else None
            for offset in (delta.offset_gain, delta.offset_shift)
        )
        return gain, shift

    def bt(self, shape: ModuleShape) -> torch.Tensor:
        """B transposed of `shape`, a view [rank, out_features]."""
        delta = self.modules[shape.name]
        end = delta.offset_b + delta.rank * shape.out_features
        return self.slab[delta.offset_b : end].view(delta.rank, shape.out_features)


@dataclass(frozen=True, slots=True)
class LoRAPair:
    """One module's matrices as PEFT names them: a [rank, in_features], b [out_features, rank]; with a `gain`, b is
    multiplied by it already. Vectors are [out_features]."""

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


def slab_numel(ranks: Iterable[tuple[ModuleShape, int]]) -> int:
    """Elements of the A and B of modules of these ranks."""
    return sum(rank * (shape.in_features + shape.out_features) for shape, rank in ranks)


def pack(digest: str, pairs: Iterable[LoRAPair], dtype: torch.dtype) -> LoRAWeights:
    """Copy `pairs` into one new slab of `dtype` (one rounding per value)."""
    pairs = list(pairs)
    slab = torch.empty(sum(pair.numel for pair in pairs), dtype=dtype)
    modules: dict[str, ModuleDelta] = {}
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
            pair.a.shape[0], pair.scaling, put(a), put(pair.b.T), put(pair.gain), put(pair.shift)
        )
    return LoRAWeights(digest, slab, modules)
