"""AdapterPlan: which matrices of a file go to which modules of the base, decided without reading a value.

Every tensor of the file is used, and every module that the config selects has its two tensors; anything else
is refused by name. So nothing is silently ignored.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from loraplex.errors import AdapterInvalid
from loraplex.lora.headers import SafetensorsHeader, TensorInfo
from loraplex.lora.peft import ALL_LINEAR, PeftConfig
from loraplex.lora.rules import ModuleRules
from loraplex.lora.text import listed, shown
from loraplex.lora.weights import ModuleShape, slab_numel

# alpha of 16 to 64 on rank 8 to 64 is usual; a factor beyond this is a typing error or an attack on the
# numerics
MAX_SCALING = 1024.0

_PREFIX = "base_model.model."
# base_model.model.<module>.lora_A[.<adapter name>].weight; the adapter's name is matched only if there must be one
_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>A|B|embedding_A|embedding_B|magnitude_vector)"
    r"(\.(?P<adapter>[^.]+))??(\.(?P<kind>weight|bias))?"
)
# part and kind of a key -> what it is of its module; anything else is not PEFT's spelling
_PARTS = {
    ("A", "weight"): "A",
    ("B", "weight"): "B",
    ("B", "bias"): "bias",
    ("magnitude_vector", "weight"): "magnitude",
    ("magnitude_vector", None): "magnitude",
    ("embedding_A", None): "embedding A",
    ("embedding_B", None): "embedding B",
}
# PEFT writes the base's own tensor beside a LoRA on an embedding or an output head.
_COPY = re.compile(r"base_model\.model\.(?P<module>.+)\.base_layer\.(?P<tensor>weight|bias)")
_LABELS = {
    "A": "lora_A",
    "B": "lora_B",
    "magnitude": "lora_magnitude_vector",
    "bias": "lora_B.bias",
    "embedding A": "lora_embedding_A",
    "embedding B": "lora_embedding_B",
}
_FIELDS = {
    "magnitude": "adapter_config.json does not set use_dora",
    "bias": "adapter_config.json does not set lora_bias",
}
_NO_EMBEDDING = (
    "its module is of another kind in this base (an embedding has lora_embedding_A and _B, a linear lora_A and _B)"
)
_NOT_SERVED = (
    (re.compile(r"\.base_layer\."), "copies of the base's own weights are not served yet"),
    (re.compile(r"\.modules_to_save\."), "whole trained modules are not served yet"),
    (re.compile(r"\.token_adapter\.|\.trainable_tokens_"), "trained token rows are not served yet"),
)


@dataclass(frozen=True, slots=True)
class ModulePlan:
    """One module's LoRA: A is the tensor `key_a` [rank, in_features], B is `key_b` [out_features, rank]. With DoRA
    `key_magnitude` and with lora_bias `key_bias` are vectors [out_features]."""

    shape: ModuleShape
    rank: int
    scaling: float
    key_a: str
    key_b: str
    key_magnitude: str | None = None
    key_bias: str | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(key for key in (self.key_a, self.key_b, self.key_magnitude, self.key_bias) if key is not None)


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """The modules of one adapter in the base's order, by name; the keys of copies of the base's own weights, by
    module; and remarks for whoever uploaded it."""

    modules: Mapping[str, ModulePlan]
    copies: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def max_rank(self) -> int:
        return max((module.rank for module in self.modules.values()), default=0)

    def covers_token(self, token_id: int) -> bool:
        """Whether the adapter trained the embedding's row of `token_id`."""
        del token_id  # a LoRA on the embedding trains every row
        return any(module.shape.kind == "embedding" for module in self.modules.values())

    @property
    def numel(self) -> int:
        """Elements of the slab."""
        vectors = sum((len(module.keys) - 2) * module.shape.out_features for module in self.modules.values())
        return vectors + slab_numel((module.shape, module.rank) for module in self.modules.values())


def plan(config: PeftConfig, header: SafetensorsHeader, targets: Mapping[str, ModuleShape]) -> AdapterPlan:
    """Match the file's tensors to the base's `targets`. Raises AdapterInvalid naming what is amiss."""
    copies = _copies(header, targets)
    parts = _parts(header, skip=set(copies.values()))
    rules = config.rules()
    selected = [name for name in targets if _selects(config, rules, targets[name])]
    _check_modules(parts, selected, targets, config)
    modules: dict[str, ModulePlan] = {}
    for name in selected:
        keys = parts[name]
        module = ModulePlan(
            targets[name],
            rules.rank_of(name),
            rules.scaling_of(name),
            keys.get("A") or keys["embedding A"],
            keys.get("B") or keys["embedding B"],
            keys.get("magnitude"),
            keys.get("bias"),
        )
        _check_shapes(module, header.tensors)
        _check_scaling(module)
        modules[name] = module
    if not any(module.scaling for module in modules.values()):
        raise AdapterInvalid(
            "The adapter has no effect: lora_alpha is 0 for every module. Correct lora_alpha in adapter_config.json.",
            param="config",
        )
    notes = [f"target_modules names {shown(name)}, which no LoRA module of this base has" for name in
             rules.unmatched(list(targets))]  # fmt: skip
    return AdapterPlan(MappingProxyType(modules), MappingProxyType(copies), tuple(notes[:20]))


def _selects(config: PeftConfig, rules: ModuleRules, shape: ModuleShape) -> bool:
    """Whether the config puts a LoRA on the module; "all-linear" means neither embedding nor head."""
    return rules.selects(shape.name) and (config.target_modules != ALL_LINEAR or shape.kind == "linear")


def _wanted(config: PeftConfig, shape: ModuleShape) -> set[str]:
    """The parts that the file must have of a selected module, and may have no others."""
    if shape.kind == "embedding":
        if config.use_dora:
            raise _refused(
                f"DoRA on the embedding {shown(shape.name, 160)} is not served yet. Train the adapter without the "
                "embedding, or without use_dora."
            )
        return {"embedding A", "embedding B"}
    return {"A", "B"} | ({"magnitude"} if config.use_dora else set()) | ({"bias"} if config.lora_bias else set())


def _refused(message: str) -> AdapterInvalid:
    return AdapterInvalid(message, param="weights")


def _copies(header: SafetensorsHeader, targets: Mapping[str, ModuleShape]) -> dict[str, str]:
    """Keys of copies of the base's embedding or head, by module (its bias: module.bias); the reader compares them."""
    copies = {}
    for key, info in header.tensors.items():
        found = _COPY.fullmatch(key.replace("_orig_mod.", ""))
        shape = targets.get(found["module"]) if found is not None else None
        if shape is None or shape.kind == "linear":
            continue
        is_bias = found is not None and found["tensor"] == "bias"
        sizes = (shape.in_features, shape.out_features)
        expected = sizes[1:] if is_bias else sizes if shape.kind == "embedding" else sizes[::-1]
        if info.shape != expected:
            raise _refused(
                f"The tensor {shown(key, 160)} has the shape {list(info.shape)}, and this base's has {list(expected)}: "
                "the adapter was trained on another vocabulary. Serve it on the base it was trained on."
            )
        copies[f"{shape.name}.bias" if is_bias else shape.name] = key
    return copies


def _parts(header: SafetensorsHeader, skip: set[str]) -> dict[str, dict[str, str]]:
    """The file's keys by module name and part ("A", "B", "magnitude", "bias", "embedding A" and "B")."""
    parts: dict[str, dict[str, str]] = {}
    adapters: set[str | None] = set()
    for key in header.tensors:
        if key in skip:
            continue
        # torch.compile puts _orig_mod. in front of whatever was compiled
        found = _KEY.fullmatch(key.replace("_orig_mod.", ""))
        part = None if found is None else _PARTS.get((found["part"], found["kind"]))
        if found is None or part is None:
            raise _refused(_why_unknown(key))
        other = parts.setdefault(found["module"], {}).setdefault(part, key)
        if other != key:
            raise _refused(
                f"The tensors {shown(other, 160)} and {shown(key, 160)} are both {_LABELS[part]} of one module. "
                "Save one adapter a file."
            )
        adapters.add(found["adapter"])
    if len(adapters) > 1:
        raise _refused(
            f"The file mixes tensors of several adapters ({listed(sorted(map(str, adapters)))}). "
            "Save one adapter a file with PEFT's save_pretrained."
        )
    return parts


def _why_unknown(key: str) -> str:
    for pattern, why in _NOT_SERVED:
        if pattern.search(key):
            return f"The tensor {shown(key, 160)} cannot be used: {why}. Train the adapter without it."
    return (
        f"The tensor {shown(key, 160)} is not a LoRA matrix in PEFT's spelling, which is "
        f"{_PREFIX}<module>.lora_A.weight and {_PREFIX}<module>.lora_B.weight. "
        "Save the adapter with PEFT's save_pretrained."
    )


def _check_modules(
    parts: dict[str, dict[str, str]], selected: list[str], targets: Mapping[str, ModuleShape], config: PeftConfig
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
                f"The module {shown(name, 160)} has {shown(key, 160)} and lacks {_LABELS[missing[0]]}. Save the "
                "adapter again with its adapter_config.json; both are needed."
            )
    if lacking := [name for name in selected if name not in parts]:
        raise _refused(
            f"adapter_config.json selects {listed(lacking)}, and the file has no tensors for that. "
            "Send the config and the weights of one save_pretrained."
        )
    if not selected:
        raise _refused(
            "The adapter has no effect: adapter_config.json selects no LoRA module of this base. "
            "Check that the adapter was trained on this base."
        )


def _why_no_target(name: str, key: str, targets: Mapping[str, ModuleShape]) -> str:
    message = f"The tensor {shown(key, 160)} is for {shown(name, 160)}, which is no LoRA module of this base."
    # a wrapper's prefix (language_model., an extra model.) is the usual cause; compare by the last three
    # parts
    tail = ".".join(name.split(".")[-4:])
    alike = [target for target in targets if target.endswith(tail)] or difflib.get_close_matches(name, targets, 1)
    if alike:
        return f"{message} Did you mean {shown(_PREFIX + alike[0], 160)}? Save the adapter with that spelling."
    return f"{message} Its modules are {listed(list(targets))}. Check that the adapter was trained on this base."


def _check_shapes(module: ModulePlan, tensors: Mapping[str, TensorInfo]) -> None:
    for key, expected in (
        (module.key_a, (module.rank, module.shape.in_features)),
        (module.key_b, (module.shape.out_features, module.rank)),
        (module.key_magnitude, (module.shape.out_features,)),
        (module.key_bias, (module.shape.out_features,)),
    ):
        if key is not None and tensors[key].shape != expected:
            raise _refused(
                f"The tensor {shown(key, 160)} has the shape {list(tensors[key].shape)}; rank {module.rank} "
                f"on this base needs {list(expected)}. Check r and rank_pattern, and that the adapter was "
                "trained on this base."
            )


def _check_scaling(module: ModulePlan) -> None:
    if abs(module.scaling) > MAX_SCALING:
        raise AdapterInvalid(
            f"The scaling of {shown(module.shape.name, 160)} is {module.scaling:g} (alpha / r); the limit is "
            f"{MAX_SCALING:g}. Check lora_alpha and alpha_pattern in adapter_config.json.",
            param="config",
        )
