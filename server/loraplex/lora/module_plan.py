"""ModulePlan and ReplacedPlan: which tensors of a file make what an adapter has on one module."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from loraplex.lora.weights import ModuleShape


@dataclass(frozen=True, slots=True)
class ModulePlan:
    """One module's LoRA. `keys`: the file's key of each part, named as in `keys.LABELS`: A [rank, in_features], B
    [out_features, rank], with DoRA the magnitude and with lora_bias the bias [out_features].

    Of experts the rank is that of each, A is [rank · E, in_features] with the experts one after the other, and B
    [out_features, rank · E] with the experts innermost; or `experts` holds (key of A, key of B) of each expert's each
    part, as older checkpoints keep them. `trained_bias`: key of the bias that takes the base's place [out_features];
    a module with nothing else has rank 0. `paths`: what the file calls the module.
    """

    shape: ModuleShape
    rank: int
    scaling: float
    keys: Mapping[str, str] = field(default_factory=dict)
    experts: tuple[tuple[tuple[str, str], ...], ...] = ()
    trained_bias: str | None = None
    paths: tuple[str, ...] = ()

    def key_of(self, part: str) -> str | None:
        """The key of "A" or "B", an embedding's too; of a vector by its name."""
        return self.keys.get(part) or self.keys.get(f"embedding {part}")

    @property
    def num_vectors(self) -> int:
        """Gains and shifts in the slab."""
        return ("magnitude" in self.keys) + ("bias" in self.keys or self.trained_bias is not None)

    @property
    def name_in_file(self) -> str:
        """A key to name in messages."""
        return next(iter(self.keys.values()), None) or (self.experts[0][0][0] if self.experts else self.shape.name)


@dataclass(frozen=True, slots=True)
class ReplacedPlan:
    """The tensor `key` takes the place of a module's parameter: all of it, or only `rows` (in the file's order).
    `stored`: the shape it has in the file."""

    shape: ModuleShape
    parameter: str
    key: str
    stored: tuple[int, ...]
    rows: tuple[int, ...] | None = None
