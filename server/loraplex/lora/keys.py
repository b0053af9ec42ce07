"""FileKeys: what the names of a file's tensors say, in PEFT's spelling.

base_model.model.<module>.lora_A[.<adapter>].weight          and lora_B, lora_embedding_A, lora_magnitude_vector, …
base_model.model.<module>.base_layer.weight                  the base's own tensor, or its trained bias
base_model.model.<module>.token_adapter.trainable_tokens_delta
base_model.model.<module>.weight                             a parameter of a saved module, or a trained bias
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from loraplex.errors import AdapterInvalid
from loraplex.lora.headers import SafetensorsHeader
from loraplex.lora.text import listed, shown
from loraplex.lora.weights import ModuleShape

PREFIX = "base_model.model."
# what PEFT calls each part of a module
LABELS: Mapping[str, str] = {
    "A": "lora_A",
    "B": "lora_B",
    "magnitude": "lora_magnitude_vector",
    "bias": "lora_B.bias",
    "embedding A": "lora_embedding_A",
    "embedding B": "lora_embedding_B",
}

# the adapter's name is matched only if there must be one
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
_BASE_LAYER = re.compile(r"base_model\.model\.(?P<module>.+)\.base_layer\.(?P<parameter>weight|bias)")
_TOKENS = re.compile(r"base_model\.model\.(?P<module>.+)\.token_adapter\.trainable_tokens_delta")
_NOT_SERVED = (
    (re.compile(r"\.base_layer\."), "PEFT writes the base's own tensor only beside a LoRA on its embedding or head"),
    (re.compile(r"\.(modules_to_save|original_module)\."), "such a second copy of a saved module has no meaning here"),
    (re.compile(r"\.token_adapter\."), "it is no tensor that PEFT writes for trainable_token_indices"),
)


@dataclass(frozen=True, slots=True)
class FileKeys:
    """Keys of a file: `lora` by module and part (those of LABELS), `base_layers` and `plain` by the parameter's path,
    `tokens` by module. Modules that older checkpoints name otherwise stand under the base's names."""

    lora: dict[str, dict[str, str]] = field(default_factory=dict)
    base_layers: dict[str, str] = field(default_factory=dict)
    plain: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)


def read_keys(header: SafetensorsHeader, targets: Mapping[str, ModuleShape]) -> FileKeys:
    """Sort the keys of `header`. Raises AdapterInvalid for one in no known spelling, and for two of one meaning."""
    renamed = Renaming(targets)
    keys = FileKeys()
    adapters: set[str | None] = set()
    for key in header.tensors:
        path = key.replace("_orig_mod.", "")  # torch.compile puts it in front of whatever was compiled
        if (found := _KEY.fullmatch(path)) is not None and (found["part"], found["kind"]) in _PARTS:
            part = _PARTS[found["part"], found["kind"]]
            _put(keys.lora.setdefault(renamed(found["module"]), {}), part, key, f"{LABELS[part]} of one module")
            adapters.add(found["adapter"])
        elif (found := _TOKENS.fullmatch(path)) is not None:
            _put(keys.tokens, renamed(found["module"]), key, "token rows of one module")
        elif (found := _BASE_LAYER.fullmatch(path)) is not None and _may_hold(targets, found, renamed):
            _put(keys.base_layers, f"{renamed(found['module'])}.{found['parameter']}", key, "one tensor of the base")
        elif _may_stand(targets, renamed(path.removeprefix(PREFIX))) and path.startswith(PREFIX):
            _put(keys.plain, renamed(path.removeprefix(PREFIX)), key, "one tensor of the base")
        else:
            raise _refused(_why_unknown(key))
    if len(adapters) > 1:
        raise _refused(
            f"The file mixes tensors of several adapters ({listed(sorted(map(str, adapters)))}). "
            "Save one adapter a file with PEFT's save_pretrained."
        )
    return keys


def canonical_key(key: str) -> str:
    """`key` as PEFT's save_pretrained spells it: without torch.compile's mark and the adapter's name."""
    path = key.replace("_orig_mod.", "")
    found = _KEY.fullmatch(path)
    if found is None:
        return path
    kind = f".{found['kind']}" if found["kind"] and found["part"] != "magnitude_vector" else ""
    return f"{PREFIX}{found['module']}.lora_{found['part']}{kind}"


def _may_hold(targets: Mapping[str, ModuleShape], found: re.Match[str], renamed: "Renaming") -> bool:
    """Whether PEFT writes this tensor of the base beside a LoRA: an embedding's, a head's, or a trained bias."""
    shape = targets.get(renamed(found["module"]))
    return shape is not None and (shape.kind in ("embedding", "head") or found["parameter"] == "bias")


def _may_stand(targets: Mapping[str, ModuleShape], path: str) -> bool:
    """Whether `path` is a parameter that an adapter can bring its own of, or some bias."""
    name, _, parameter = path.rpartition(".")
    return (name in targets and parameter in targets[name].parameters) or (
        "bias" in parameter and ".lora_" not in path and ".base_layer." not in path
    )


def _put(table: dict[str, str], name: str, key: str, what: str) -> None:
    other = table.setdefault(name, key)
    if other != key:
        raise _refused(
            f"The tensors {shown(other, 160)} and {shown(key, 160)} are both {what}. Save one adapter a file."
        )


class Renaming:
    """Paths of older checkpoints -> the base's."""

    def __init__(self, targets: Mapping[str, ModuleShape]):
        self._new: dict[str, str] = {}
        for name, shape in targets.items():
            for alias in shape.aliases:
                is_parameter = shape.kind == "experts"  # its module is what holds it
                old, new = (path.rpartition(".")[0] if is_parameter else path for path in (alias, name))
                self._new[old] = new

        self._depth = max((old.count(".") + 1 for old in self._new), default=0)

    def __call__(self, path: str) -> str:
        if not self._new:
            return path
        parts = path.split(".")
        for end in range(min(self._depth, len(parts)), 0, -1):  # a file's names may be megabytes deep
            new = self._new.get(".".join(parts[:end]))
            if new is not None:
                return ".".join([new, *parts[end:]])
        return path


def _refused(message: str) -> AdapterInvalid:
    return AdapterInvalid(message, param="weights")


def _why_unknown(key: str) -> str:
    for pattern, why in _NOT_SERVED:
        if pattern.search(key):
            return f"The tensor {shown(key, 160)} cannot be used: {why}. Train the adapter without it."
    if key.startswith(PREFIX) and ".lora_" not in key:
        return (
            f"The tensor {shown(key, 160)} is no LoRA matrix in PEFT's spelling, nor a parameter that an adapter can "
            "change on this base (by modules_to_save or bias). Train the adapter without it, and check that it was "
            "trained on this base."
        )
    return (
        f"The tensor {shown(key, 160)} is not a LoRA matrix in PEFT's spelling, which is "
        f"{PREFIX}<module>.lora_A.weight and {PREFIX}<module>.lora_B.weight. "
        "Save the adapter with PEFT's save_pretrained."
    )
