"""LoRAWeights: one adapter in memory, as the kernels read it.

The whole adapter is one flat slab. For a module of rank r, A is stored row-major as [r, in_features] and B
transposed ("rank-major") as [r, out_features], so that expand walks contiguous rows:

    slab: | A_0 | Bt_0 | A_1 | Bt_1 | ...        ModuleDelta.offset_a / offset_b index its elements

ΔW = scaling · B · A with scaling = alpha / r, or alpha / sqrt(r) for rsLoRA (Hu et al. 2021, eq. 3;
Kalajdzievski 2023); scaling is kept apart, not folded, so that the slab holds the file's own values.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class ModuleShape:
    """A module of the base that can carry a LoRA. `name` is its path in the transformers model."""

    name: str
    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True)
class ModuleDelta:
    """Where one module's A [rank, in] and Bt [rank, out] start in the slab (in elements), and its scaling."""

    rank: int
    scaling: float
    offset_a: int
    offset_b: int


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

    def a(self, shape: ModuleShape) -> torch.Tensor:
        """A of `shape`, a view [rank, in_features]."""
        delta = self.modules[shape.name]
        end = delta.offset_a + delta.rank * shape.in_features
        return self.slab[delta.offset_a : end].view(delta.rank, shape.in_features)

    def bt(self, shape: ModuleShape) -> torch.Tensor:
        """B transposed of `shape`, a view [rank, out_features]."""
        delta = self.modules[shape.name]
        end = delta.offset_b + delta.rank * shape.out_features
        return self.slab[delta.offset_b : end].view(delta.rank, shape.out_features)


@dataclass(frozen=True, slots=True)
class LoRAPair:
    """One module's matrices as PEFT names them: a [rank, in_features], b [out_features, rank]."""

    shape: ModuleShape
    a: torch.Tensor
    b: torch.Tensor
    scaling: float


def slab_numel(ranks: Iterable[tuple[ModuleShape, int]]) -> int:
    """Elements of the slab that holds modules of these ranks."""
    return sum(rank * (shape.in_features + shape.out_features) for shape, rank in ranks)


def pack(digest: str, pairs: Iterable[LoRAPair], dtype: torch.dtype) -> LoRAWeights:
    """Copy `pairs` into one new slab of `dtype` (one rounding per value)."""
    pairs = list(pairs)
    slab = torch.empty(slab_numel((pair.shape, pair.a.shape[0]) for pair in pairs), dtype=dtype)
    modules: dict[str, ModuleDelta] = {}
    offset = 0
    for pair in pairs:
        rank, size_a, size_b = pair.a.shape[0], pair.a.numel(), pair.b.numel()
        modules[pair.shape.name] = ModuleDelta(rank, pair.scaling, offset, offset + size_a)
        slab[offset : offset + size_a].view(rank, -1).copy_(pair.a)
        slab[offset + size_a : offset + size_a + size_b].view(rank, -1).copy_(pair.b.T)
        offset += size_a + size_b
    return LoRAWeights(digest, slab, modules)
