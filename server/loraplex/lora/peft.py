"""PeftConfig: what adapter_config.json says, read by the closed list of `fields`.

Nothing in the file is ever imported or run. The meaning of every field is PEFT's (checked against 0.21).
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from loraplex.errors import AdapterInvalid
from loraplex.lora.digest import MAX_CONFIG_BYTES
from loraplex.lora.fields import CHANGED_BASE_INITS, HARMLESS_INITS, IGNORED, is_off, refusal_of
from loraplex.lora.text import shown

ALL_LINEAR = "all-linear"
# A rank beyond every matrix this could be for; the server's own limit (--max-lora-rank) is checked by the
# reader.
MAX_RANK = 1 << 16
# Entries of modules_to_save and target_parameters, which are compared with every module of the base.
MAX_NAMES = 256
_PATH = re.compile(r"[A-Za-z0-9_.]+")
# What Unsloth and PEFT write into auto_mapping; the classes named there are not imported.
_AUTO_MAPPING_KEYS = frozenset({"base_model_class", "parent_library", "unsloth_fixed"})


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """A LoRA for a causal language model, with whatever PEFT trains beside it.

    `target_modules` is a tuple of names, a regular expression, or "all-linear"; `exclude_modules` a tuple or
    an expression; `layers_to_transform` None for all. `token_indices` are the rows of trainable_token_indices by
    the module's name, "" for the input embedding. `base_model` is the writer's word for its base, a hint only.
    `ignored` holds (field, reason) of every field of the file that has a value and no effect on inference.
    """

    r: int
    lora_alpha: float
    target_modules: tuple[str, ...] | str
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    exclude_modules: tuple[str, ...] | str = ()
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    fan_in_fan_out: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: tuple[str, ...] = ()
    token_indices: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    target_parameters: tuple[str, ...] = ()
    ensure_weight_tying: bool = False
    base_model: str | None = None
    ignored: tuple[tuple[str, str], ...] = ()

    @classmethod
    def from_bytes(cls, data: bytes) -> "PeftConfig":
        """Read the bytes of adapter_config.json. Raises AdapterInvalid."""
        return _Reader(_json_object(data)).config()


def _invalid(message: str) -> AdapterInvalid:
    return AdapterInvalid(message, param="config")


def _json_object(data: bytes) -> dict[str, Any]:
    if len(data) > MAX_CONFIG_BYTES:
        raise _invalid(
            f"adapter_config.json has {len(data)} bytes; the limit is {MAX_CONFIG_BYTES}. "
            "Send the file that PEFT's save_pretrained wrote."
        )
    try:
        document = json.loads(
            data.decode("utf-8-sig"), object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite
        )
    except (ValueError, RecursionError) as cause:
        raise _invalid(
            f"adapter_config.json is not valid JSON: {shown(str(cause), 160)}. "
            "Send the file that PEFT's save_pretrained wrote."
        ) from None
    if not isinstance(document, dict):
        raise _invalid(
            f"adapter_config.json holds {shown(document)} where a JSON object is expected. "
            "Send the file that PEFT's save_pretrained wrote."
        )
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("an object names the same key twice")
    return document


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is not a finite number")
    return number


class _Reader:
    """Reads one JSON object field by field; every method raises AdapterInvalid naming the field."""

    def __init__(self, document: dict[str, Any]):
        self._document = document

    def config(self) -> PeftConfig:
        self._check_kind()
        for field, value in self._document.items():
            if (refusal := refusal_of(field, value)) is not None:
                raise _invalid(
                    f"adapter_config.json sets {shown(field)} to {shown(value)}: {refusal.why}. {refusal.next_step}."
                )
        self._check_init()
        self._check_auto_mapping()
        config = PeftConfig(
            r=self._rank(self._required("r"), "r"),
            lora_alpha=self._number(self._required("lora_alpha"), "lora_alpha"),
            target_modules=self._target_modules(),
            use_rslora=self._flag("use_rslora"),
            rank_pattern=self._pattern("rank_pattern", self._rank),
            alpha_pattern=self._pattern("alpha_pattern", self._number),
            exclude_modules=self._names("exclude_modules"),
            layers_to_transform=self._layers(),
            layers_pattern=self._layers_pattern(),
            fan_in_fan_out=self._flag("fan_in_fan_out"),
            use_dora=self._flag("use_dora"),
            lora_bias=self._flag("lora_bias"),
            bias=self._bias(),
            modules_to_save=self._plain_names("modules_to_save"),
            token_indices=self._token_indices(),
            target_parameters=self._plain_names("target_parameters"),
            ensure_weight_tying=self._flag("ensure_weight_tying"),
            base_model=self._hint("base_model_name_or_path"),
            ignored=self._ignored(),
        )
        if isinstance(config.target_modules, str) and (config.layers_to_transform is not None or config.layers_pattern):
            raise _invalid(
                "adapter_config.json sets layers_to_transform or layers_pattern beside a target_modules "
                "that is a string; PEFT refuses that too. Put the layers into the expression, or write "
                "target_modules as a list."
            )
        if config.use_dora and config.lora_bias:
            raise _invalid(
                "adapter_config.json sets 'use_dora' and 'lora_bias' together; PEFT refuses that too. "
                "Train it with one of them."
            )
        if config.layers_pattern and config.layers_to_transform is None:
            raise _invalid(
                "adapter_config.json sets layers_pattern without layers_to_transform; PEFT refuses that too. "
                "Set layers_to_transform, or remove layers_pattern."
            )
        return config

    def _check_kind(self) -> None:
        kind = self._document.get("peft_type")
        if kind != "LORA":
            raise _invalid(
                f"adapter_config.json says peft_type {shown(kind)}; this server serves LORA only. "
                'Send an adapter_config.json with "peft_type": "LORA".'
            )
        task = self._document.get("task_type")
        if task not in (None, "CAUSAL_LM"):
            raise _invalid(
                f"adapter_config.json says task_type {shown(task)}; this server serves CAUSAL_LM only. "
                "Train the adapter for a causal language model."
            )

    def _check_init(self) -> None:
        init = self._document.get("init_lora_weights")
        if init is None or isinstance(init, bool) or (isinstance(init, str) and init.lower() in HARMLESS_INITS):
            return
        if isinstance(init, str) and init.lower().startswith(CHANGED_BASE_INITS):
            raise _invalid(
                f"adapter_config.json sets 'init_lora_weights' to {shown(init)}: such an adapter belongs to "
                "a base whose weights were changed when it was initialised, and would answer wrongly on "
                "this one. Save it with PEFT's save_pretrained(..., "
                "path_initial_model_for_weight_conversion=...), which turns it into a plain LoRA, or merge "
                "it and serve the result as a base."
            )
        raise _invalid(
            f"adapter_config.json sets 'init_lora_weights' to {shown(init)}, which this server does not "
            "know, so it cannot tell whether the base was changed. Save the adapter with a PEFT release "
            "this server knows."
        )

    def _check_auto_mapping(self) -> None:
        mapping = self._document.get("auto_mapping")
        if is_off(mapping):
            return
        library = mapping.get("parent_library") if isinstance(mapping, dict) else None
        known = isinstance(mapping, dict) and _AUTO_MAPPING_KEYS.issuperset(mapping)
        if not (known and isinstance(library, str) and library.split(".")[0] == "transformers"):
            raise _invalid(
                f"adapter_config.json sets 'auto_mapping' to {shown(mapping)}: it names code outside "
                "transformers, and an adapter's code is never run. Remove the field."
            )

    def _ignored(self) -> tuple[tuple[str, str], ...]:
        found = [
            (field, IGNORED[field]) for field, value in self._document.items() if field in IGNORED if not is_off(value)
        ]
        for field, reason in (
            ("init_lora_weights", "it says how training began; this initialisation leaves the base as it is"),
            ("auto_mapping", "it names a class of transformers, which this server chooses itself"),
            (
                "base_model_name_or_path",
                "the base is the one this server was started with; shapes are checked",
            ),
        ):
            if not is_off(self._document.get(field)):
                found.append((field, reason))
        return tuple(sorted(found))

    def _required(self, field: str) -> Any:
        if self._document.get(field) is None:
            raise _invalid(
                f"adapter_config.json does not say {field!r}. Send the file that PEFT's save_pretrained wrote."
            )
        return self._document[field]

    def _wrong(self, field: str, value: Any, expected: str) -> AdapterInvalid:
        return _invalid(
            f"adapter_config.json sets {field} to {shown(value)} where {expected} is expected. "
            "Send the file that PEFT's save_pretrained wrote."
        )

    def _rank(self, value: Any, field: str) -> int:
        if type(value) is not int or not 1 <= value <= MAX_RANK:
            raise self._wrong(field, value, f"an integer from 1 to {MAX_RANK}")
        return value

    def _number(self, value: Any, field: str) -> float:
        if type(value) not in (int, float) or abs(value) > 1e12:
            raise self._wrong(field, value, "a finite number")
        return float(value)

    def _flag(self, field: str) -> bool:
        value = self._document.get(field)
        if not isinstance(value, bool | None):
            raise self._wrong(field, value, "true or false")
        return bool(value)

    def _hint(self, field: str) -> str | None:
        value = self._document.get(field)
        return value[:500] if isinstance(value, str) and value else None

    def _names(self, field: str) -> tuple[str, ...] | str:
        value = self._document.get(field)
        if is_off(value):
            return ()
        if isinstance(value, str):
            return value
        if not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
            raise self._wrong(field, value, "a list of names or a string")
        return tuple(value)

    def _target_modules(self) -> tuple[str, ...] | str:
        names = self._names("target_modules")
        if not names and is_off(self._document.get("target_parameters")):
            raise _invalid(
                "adapter_config.json names no target_modules, so the adapter would act on nothing. "
                "Send the file that PEFT's save_pretrained wrote, which lists them."
            )
        return ALL_LINEAR if isinstance(names, str) and names.lower() == ALL_LINEAR else names

    def _bias(self) -> Literal["none", "all", "lora_only"]:
        value = self._document.get("bias")
        if value not in (None, "none", "all", "lora_only"):
            raise self._wrong("bias", value, "'none', 'all' or 'lora_only'")
        return value or "none"

    def _plain_names(self, field: str) -> tuple[str, ...]:
        """Names of modules or parameters; PEFT compares them as they are."""
        names = self._names(field)
        if isinstance(names, str) or len(names) > MAX_NAMES or not all(_PATH.fullmatch(name) for name in names):
            raise self._wrong(field, self._document[field], f"a list of at most {MAX_NAMES} names")
        return names

    def _token_indices(self) -> Mapping[str, tuple[int, ...]]:
        value = self._document.get("trainable_token_indices")
        if is_off(value):
            return MappingProxyType({})
        tables: dict[str, Any] = value if isinstance(value, dict) else {"": value}
        for indices in tables.values():
            if not (isinstance(indices, list) and indices and all(type(i) is int and i >= 0 for i in indices)):
                raise self._wrong("trainable_token_indices", value, "a list of token ids, or one for each module")
            if len(set(indices)) != len(indices):
                raise self._wrong("trainable_token_indices", value, "a list that names no token twice")
        return MappingProxyType({name: tuple(indices) for name, indices in tables.items()})

    def _layers(self) -> tuple[int, ...] | None:
        value = self._document.get("layers_to_transform")
        if value is None:
            return None
        layers = value if isinstance(value, list) else [value]
        if not all(type(layer) is int for layer in layers):
            raise self._wrong("layers_to_transform", value, "an integer or a list of integers")
        return tuple(layers)

    def _layers_pattern(self) -> tuple[str, ...]:
        names = self._names("layers_pattern")
        return (names,) if isinstance(names, str) else names

    def _pattern(self, field: str, read: Any) -> Mapping[str, Any]:
        value = self._document.get(field)
        if value is None:
            return MappingProxyType({})
        if not isinstance(value, dict):
            raise self._wrong(field, value, "an object of module names and numbers")
        return MappingProxyType({key: read(number, f"{field}[{shown(key)}]") for key, number in value.items()})
