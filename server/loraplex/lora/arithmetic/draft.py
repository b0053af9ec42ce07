"""Draft: an adapter that was reckoned out, before it is a folder."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from loraplex.lora.arithmetic.factors import Factors
from loraplex.lora.weights import ModuleShape

Tick = Callable[[int, int], None]
"""Called with (modules done, modules in all)."""


def no_tick(done: int, total: int) -> None:
    """Nobody looks on."""


@dataclass(frozen=True, slots=True)
class ModuleResult:
    """What became of one module. `energy`: the share of the wanted delta's squared Frobenius norm that the written one
    has (1: all of it); `norm`: the wanted delta's Frobenius norm; `before`: the rank it came with."""

    name: str
    rank: int
    before: int
    energy: float
    norm: float


@dataclass(frozen=True, slots=True, eq=False)
class Draft:
    """The LoRA of each module of `shapes`, with scaling 1; `fields` of adapter_config.json beside those that follow
    from it; `tensors` by key, to be written as they are. `notes` are for whoever asked."""

    shapes: Mapping[str, ModuleShape]
    factors: Mapping[str, Factors]
    fields: Mapping[str, Any]
    results: tuple[ModuleResult, ...]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    texts: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def energy(self) -> float:
        """The share kept over all modules together."""
        total = sum(result.norm**2 for result in self.results)
        return sum(result.energy * result.norm**2 for result in self.results) / total if total else 1.0
