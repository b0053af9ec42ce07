"""Assembly: the tensors of a plan, as the slab is to hold them.

PEFT's spellings end here: experts become [E, ...], magnitudes become gains, trained biases shifts, a router's LoRA a
router's weight.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from loraplex.errors import AdapterInvalid
from loraplex.lora.module_plan import ModulePlan, ReplacedPlan
from loraplex.lora.norms import Norms, norm_of_rows
from loraplex.lora.plan import AdapterPlan
from loraplex.lora.tensors import FileTensors
from loraplex.lora.weights import LoRAPair, ModuleShape, ReplacedParameter

TensorOf = Callable[[str], torch.Tensor]
"""Path of a parameter or buffer of the base ("model.norm.weight") -> the tensor as the base stores it. Raises KeyError
for a path that the base does not have."""


class Assembly:
    """`plan` and its file's `tensors`; `tensor_of` gives the base's. Everything here is on the CPU."""

    def __init__(self, plan: AdapterPlan, tensors: FileTensors, tensor_of: TensorOf):
        self._modules = [module for module in plan.modules.values() if module.shape.kind != "leaf"]
        self._folded = [module for module in plan.modules.values() if module.shape.kind == "leaf"]
        self._replaced = plan.replaced
        self._tensors = tensors
        self._tensor_of = tensor_of

    @property
    def gained(self) -> dict[str, int]:
        """The modules with DoRA's magnitudes, and their outputs."""
        return {m.shape.name: m.shape.out_features for m in self._modules if "magnitude" in m.keys}

    def norms(self) -> Norms:
        """DoRA's norms of `gained`."""
        norms = {}
        for module in self._modules:
            if "magnitude" in module.keys:
                a, b = self.matrices(module)
                norms[module.shape.name] = norm_of_rows(self._weight(module.shape), a, b, module.scaling)
        return norms

    def pairs(self, norms: Norms | None) -> list[LoRAPair]:
        """The modules' matrices and vectors. `norms` None: DoRA's magnitudes stand where the gains would be."""
        pairs = []
        for module in self._modules:
            a, b = self.matrices(module)
            magnitude = self._tensors.get(module.keys.get("magnitude"))
            scaling = module.scaling * module.shape.output_scale
            pair = LoRAPair(module.shape, a, b, scaling, gain=magnitude, shift=self._shift(module))
            pairs.append(pair if norms is None or magnitude is None else _gained(pair, norms[module.shape.name]))
        return pairs

    def replaced(self) -> list[ReplacedParameter]:
        """The parameters that take the base's places."""
        found = [self._replacement(one) for one in self._replaced]
        for module in self._folded:
            a, b = self.matrices(module)
            weight = self._tensor_of(f"{module.shape.name}.weight").cpu()
            changed = weight.float() + module.scaling * (b.float() @ a.float())
            found.append(ReplacedParameter(module.shape, "weight", changed))
        return found

    def matrices(self, module: ModulePlan) -> tuple[torch.Tensor, torch.Tensor]:
        """A [rank, in] and B [out, rank] of a module of the plan, in the file's type and without its scaling; of
        experts [E, rank, in] and [E, out, rank]."""
        shape, count = module.shape, module.shape.num_experts
        if module.experts:
            pairs = [[(self._tensors[a], self._tensors[b]) for a, b in parts] for parts in module.experts]
            return (
                torch.stack([torch.cat([a for a, _ in parts]) for parts in pairs]),
                torch.stack([torch.block_diag(*(b for _, b in parts)) for parts in pairs]),
            )
        if not module.rank:
            return torch.empty(0, shape.in_features), torch.empty(shape.out_features, 0)
        a, b = self._tensors[_known(module.key_of("A"))], self._tensors[_known(module.key_of("B"))]
        if shape.kind == "experts":
            # PEFT's ParamWrapper: A holds the experts one after the other, B has them innermost
            return a.view(count, module.rank, -1), b.view(shape.out_features, module.rank, count).permute(2, 0, 1)
        return a, b

    def _shift(self, module: ModulePlan) -> torch.Tensor | None:
        shifts = []
        if (bias := self._tensors.get(module.keys.get("bias"))) is not None:
            shifts.append(module.scaling * bias.float())
        if (trained := self._tensors.get(module.trained_bias)) is not None:
            shifts.append(trained.float() - self._tensor_of(f"{module.shape.name}.bias").cpu().float())
        return sum(shifts[1:], start=shifts[0]) if shifts else None

    def _replacement(self, plan: ReplacedPlan) -> ReplacedParameter:
        tensor, shape = self._tensors[plan.key], plan.shape
        if plan.rows is not None:
            rows, order = torch.tensor(plan.rows).sort()
            return ReplacedParameter(shape, plan.parameter, tensor[order], rows)
        return ReplacedParameter(shape, plan.parameter, tensor.T if shape.transposed else tensor)

    def _weight(self, shape: ModuleShape) -> torch.Tensor:
        """The base's weight as [out, in]."""
        weight = self._tensor_of(f"{shape.name}.weight")
        return weight.T if shape.transposed or shape.kind == "embedding" else weight


def _gained(pair: LoRAPair, norm: torch.Tensor) -> LoRAPair:
    """`pair` with DoRA's magnitude m turned into the gain m / norm, and B multiplied by it."""
    assert pair.gain is not None
    gain = pair.gain.float() / norm
    if not bool(torch.isfinite(gain).all()):
        raise AdapterInvalid(f"DoRA's gain of {pair.shape.name} is not finite: a row of the changed weight is zero")
    return replace(pair, b=gain.unsqueeze(1) * pair.b.float(), gain=gain)


def _known(key: str | None) -> str:
    assert key is not None, "a module with a rank has A and B"
    return key
