"""AdapterPlan: which tensors of a file go to which modules of the base, decided without reading a value.

Every tensor of the file is used, and every module that the config selects has its tensors; anything else is refused
by name. So nothing is silently ignored.
"""

import difflib
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType

from loraplex.errors import AdapterInvalid
from loraplex.lora.expert_plan import plan_experts
from loraplex.lora.headers import SafetensorsHeader, TensorInfo
from loraplex.lora.keys import LABELS, PREFIX, FileKeys, read_keys
from loraplex.lora.module_plan import ModulePlan, ReplacedPlan
from loraplex.lora.peft import ALL_LINEAR, PeftConfig
from loraplex.lora.replacements import Replacements
from loraplex.lora.rules import ModuleRules
from loraplex.lora.text import listed, shown
from loraplex.lora.weights import ModuleShape, slab_numel

# alpha of 16 to 64 on rank 8 to 64 is usual; a factor beyond this is a typing error or an attack on the
# numerics
MAX_SCALING = 1024.0

_FIELDS = {
    "magnitude": "adapter_config.json does not set use_dora",
    "bias": "adapter_config.json does not set lora_bias",
}
_NO_EMBEDDING = (
    "its module is of another kind in this base (the input embedding has lora_embedding_A and _B, all others lora_A "
    "and _B)"
)


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """What an adapter changes of a base. `modules` in the base's order, by name; `replaced` parameters; `copies`: keys
    of tensors that must be the base's own, by their path in it; `twins`: pairs of keys whose tensors must be equal;
    `notes`: remarks for whoever uploaded it."""

    modules: Mapping[str, ModulePlan]
    replaced: tuple[ReplacedPlan, ...] = ()
    copies: Mapping[str, str] = field(default_factory=dict)
    twins: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def max_rank(self) -> int:
        return max((module.rank for module in self.modules.values()), default=0)

    @property
    def trained_tokens(self) -> Container[int]:
        """The token ids whose rows of the embedding the adapter trained."""
        for module in self.modules.values():
            if module.shape.kind == "embedding" and module.rank:
                return range(module.shape.in_features)  # a LoRA on the embedding trains every row
        own = [one for one in self.replaced if one.shape.kind == "embedding"]
        return frozenset(row for one in own for row in (range(one.stored[0]) if one.rows is None else one.rows))

    @property
    def numel(self) -> int:
        """Elements of the slab."""
        folded = [m.shape for m in self.modules.values() if m.shape.kind == "leaf"]
        apart = [module for module in self.modules.values() if module.shape.kind != "leaf"]
        vectors = sum(module.num_vectors * module.shape.out_features for module in apart)
        matrices = slab_numel((module.shape, module.rank) for module in apart)
        replaced = sum(prod(one.stored) for one in self.replaced)
        return vectors + matrices + replaced + sum(prod(shape.parameters["weight"]) for shape in folded)


def plan(config: PeftConfig, header: SafetensorsHeader, targets: Mapping[str, ModuleShape]) -> AdapterPlan:
    """Match the file's tensors to the base's `targets`. Raises AdapterInvalid naming what is amiss."""
    keys = read_keys(header, targets)
    rules = ModuleRules(config)
    experts = plan_experts(config, rules, keys.lora, header, targets)
    selected = _selected(config, rules, keys, targets)
    used = {path for module in experts.values() for path in module.paths}
    _check_modules({path: parts for path, parts in keys.lora.items() if path not in used}, selected, targets, config)
    if not selected and not experts:
        raise _refused(
            "The adapter has no effect: adapter_config.json selects no LoRA module of this base. "
            "Check that the adapter was trained on this base."
        )
    modules = dict(experts)
    for name in selected:
        shape = targets[name]
        names = (f"{name}.weight",) if rules.selects_parameter(f"{name}.weight") else (*shape.aliases, name)
        rank = rules.rank_of(*names)
        if shape.is_tied and rules.ties_lora:  # its matrices are the embedding's, and the scaling is its own
            rank = next((module.rank for module in modules.values() if module.shape.kind == "embedding"), rank)
        module = ModulePlan(shape, rank, rules.scaling_of(*names), keys.lora[name])
        _check_shapes(module, header.tensors)
        modules[name] = module
    for module in modules.values():
        _check_scaling(module)
    if not any(module.scaling for module in modules.values()):
        raise AdapterInvalid(
            "The adapter has no effect: lora_alpha is 0 for every module. Correct lora_alpha in adapter_config.json.",
            param="config",
        )
    rest = Replacements(config, rules, keys, header, targets, modules)
    rest.resolve()
    in_order = {name: rest.modules[name] for name in targets if name in rest.modules}
    notes = [*_unmatched(rules, targets, experts), *_ambiguous(rules, in_order), *rest.notes]
    return AdapterPlan(
        MappingProxyType(in_order),
        tuple(rest.replaced),
        MappingProxyType(rest.copies),
        tuple(rest.twins),
        tuple(notes[:20]),
    )


def _ambiguous(rules: ModuleRules, modules: Mapping[str, ModulePlan]) -> Iterable[str]:
    for name in modules:
        if found := rules.ambiguous_alpha(name):
            yield (
                f"alpha_pattern names {shown(name, 160)} by {listed(found)} with different values: the first in the "
                "file counts, and PEFT sorts them when it writes, so check that it was the first in training too"
            )


def _unmatched(
    rules: ModuleRules, targets: Mapping[str, ModuleShape], experts: Mapping[str, ModulePlan]
) -> Iterable[str]:
    names = [name for name, shape in targets.items() if shape.kind != "experts"]
    names += [path for module in experts.values() for path in module.paths]
    parts = {part for shape in targets.values() for part in shape.parts}
    for name in rules.unmatched(names):
        if name.rpartition(".")[2] in parts:
            yield f"target_modules names {shown(name)}, and the file has no tensors for the experts' {name}"
        else:
            yield f"target_modules names {shown(name)}, which no LoRA module of this base has"


def _selected(config: PeftConfig, rules: ModuleRules, keys: FileKeys, targets: Mapping[str, ModuleShape]) -> list[str]:
    """The modules other than experts that carry a LoRA, in the base's order."""
    selected = [
        name for name, shape in targets.items() if shape.kind != "experts" and _selects(config, rules, keys, shape)
    ]
    heads = [name for name, shape in targets.items() if shape.is_tied]
    embeddings = [name for name, shape in targets.items() if shape.kind == "embedding"]
    tied: list[str] = []
    if heads and rules.ties_lora:
        # PEFT puts a LoRA on the embedding and, transposed, on the head that shares its weight, whichever is named
        tied = embeddings + heads
    elif config.ensure_weight_tying and set(embeddings) <= set(selected):
        tied = [name for name in heads if name in keys.lora]
    return selected + [name for name in tied if name not in selected]


def _selects(config: PeftConfig, rules: ModuleRules, keys: FileKeys, shape: ModuleShape) -> bool:
    """Whether the config puts a LoRA on the module; "all-linear" means neither embedding nor head. A leaf (a router)
    is selected by its parameter, or under the name it had as a linear."""
    if rules.selects_parameter(f"{shape.name}.weight"):
        if shape.kind == "embedding" or shape.transposed or not shape.in_features:
            raise _refused(
                f"target_parameters names the weight of {shown(shape.name, 160)}, where that is not served. Use "
                "target_modules for it."
            )
        if shape.kind != "leaf" and rules.selects(shape.name):
            raise _refused(
                f"target_parameters and target_modules both name {shown(shape.name, 160)}; PEFT refuses that too. Name "
                "it in one of them."
            )
        return True
    if shape.kind == "leaf":
        is_named = any(rules.selects(path) for path in (shape.name, *shape.aliases))
        return shape.name in keys.lora and bool(shape.in_features) and is_named
    return rules.selects(shape.name) and (config.target_modules != ALL_LINEAR or shape.kind == "linear")


def _wanted(config: PeftConfig, shape: ModuleShape) -> set[str]:
    """The parts that the file must have of a selected module, and may have no others."""
    matrices = {"embedding A", "embedding B"} if shape.kind == "embedding" else {"A", "B"}
    if shape.kind == "leaf":
        return matrices
    has_bias = config.lora_bias and shape.kind != "embedding"
    return matrices | ({"magnitude"} if config.use_dora else set()) | ({"bias"} if has_bias else set())


def _refused(message: str) -> AdapterInvalid:
    return AdapterInvalid(message, param="weights")


def _check_modules(
    parts: Mapping[str, Mapping[str, str]],
    selected: list[str],
    targets: Mapping[str, ModuleShape],
    config: PeftConfig,
) -> None:
    chosen = set(selected)
    for name, keys in parts.items():
        key = next(iter(keys.values()))
        if name not in targets:
            raise _refused(_why_no_target(name, key, targets))
        if name not in chosen:
            raise _refused(
                f"The tensor {shown(key, 160)} is for a module that adapter_config.json does not select (by "
                "target_modules, exclude_modules or layers_to_transform), so PEFT would leave it out. "
                "Send the config and the weights of one save_pretrained."
            )
        wanted = _wanted(config, targets[name])
        if surplus := sorted(keys.keys() - wanted):
            why = _FIELDS.get(surplus[0], _NO_EMBEDDING)
            raise _refused(
                f"The tensor {shown(keys[surplus[0]], 160)} is there, and {why}. Send the config and the weights of "
                "one save_pretrained."
            )
        if missing := sorted(wanted - keys.keys()):
            raise _refused(
                f"The module {shown(name, 160)} has {shown(key, 160)} and lacks {LABELS[missing[0]]}. Save the "
                "adapter again with its adapter_config.json; both are needed."
            )
    if lacking := [name for name in selected if name not in parts]:
        raise _refused(
            f"adapter_config.json selects {listed(lacking)} (by target_modules, target_parameters or "
            "ensure_weight_tying), and the file has no tensors for that. Send the config and the weights of one "
            "save_pretrained."
        )


def _why_no_target(name: str, key: str, targets: Mapping[str, ModuleShape]) -> str:
    message = f"The tensor {shown(key, 160)} is for {shown(name, 160)}, which is no LoRA module of this base."
    # a wrapper's prefix (language_model., an extra model.) is the usual cause; compare by the last three
    # parts
    linears = [target for target, shape in targets.items() if shape.kind != "leaf"]
    tail = ".".join(name.split(".")[-4:])
    alike = [target for target in linears if target.endswith(tail)] or difflib.get_close_matches(name, linears, 1)
    if alike:
        return f"{message} Did you mean {shown(PREFIX + alike[0], 160)}? Save the adapter with that spelling."
    return f"{message} Its modules are {listed(linears)}. Check that the adapter was trained on this base."


def _check_shapes(module: ModulePlan, tensors: Mapping[str, TensorInfo]) -> None:
    shape, rank = module.shape, module.rank
    vector = (shape.out_features,)
    expected = {"A": (rank, shape.in_features), "B": (shape.out_features, rank), "magnitude": vector, "bias": vector}
    for part, key in module.keys.items():
        wanted = expected[part.removeprefix("embedding ")]
        if tensors[key].shape != wanted:
            raise _refused(
                f"The tensor {shown(key, 160)} has the shape {list(tensors[key].shape)}; rank {rank} "
                f"on this base needs {list(wanted)}. Check r and rank_pattern, and that the adapter was "
                "trained on this base."
            )


def _check_scaling(module: ModulePlan) -> None:
    if abs(module.scaling) > MAX_SCALING:
        raise AdapterInvalid(
            f"The scaling of {shown(module.shape.name, 160)} is {module.scaling:g} (alpha / r); the limit is "
            f"{MAX_SCALING:g}. Check lora_alpha and alpha_pattern in adapter_config.json.",
            param="config",
        )
