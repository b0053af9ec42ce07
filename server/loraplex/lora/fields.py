"""The closed list of adapter_config.json: the fields understood, those ignored and why, those refused.

`peft.PeftConfig.from_bytes` reads the file by this list. A field that is on none of the three is refused as
soon as it has a value. A test walks every field of the installed `peft.LoraConfig`, so a new one cannot slip
in.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

UNDERSTOOD = frozenset(
    {
        "peft_type",
        "task_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "fan_in_fan_out",
        "use_dora",
        "lora_bias",
        "init_lora_weights",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "modules_to_save",
        "trainable_token_indices",
        "target_parameters",
        "ensure_weight_tying",
    }
)

IGNORED: Mapping[str, str] = MappingProxyType(
    {
        "lora_dropout": "dropout acts in training only",
        "inference_mode": "it only says whether PEFT makes the weights trainable",
        "revision": "the base of this server is the one it was started with; shapes are checked",
        "peft_version": "the format is read by its fields, not by its version",
        "megatron_core": "it names a module for Megatron training and acts only with megatron_config",
        "qalora_group_size": "it acts only with use_qalora",
        "loftq_config": "it acts only with init_lora_weights=loftq, which is refused",
        "corda_config": "it acts only with init_lora_weights=corda, which is refused",
        "lora_ga_config": "it acts only with init_lora_weights=lora_ga, which is refused",
        "eva_config": "EVA chooses the start of A and the ranks, which rank_pattern holds; the base stays",
        "runtime_config": "PEFT itself drops it when it reads the file",
        "merge_weights": "old PEFT's switch for merging at run time; merging is the server's choice",
    }
)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a field with a value is refused, and what the user can do."""

    why: str
    next_step: str


_RETRAIN = "Train the adapter again without it"
_MERGE_BASE = "Merge the adapter into its base with PEFT and serve the result as a base, or train it again without it"
_NO_CODE = Refusal("it names code to import, and an adapter's code is never run", "Remove the field")

REFUSED: Mapping[str, Refusal] = MappingProxyType(
    {
        "use_qalora": Refusal("QALoRA pools the inputs of A, which is not served", _RETRAIN),
        "alora_invocation_tokens": Refusal(
            "aLoRA acts only after its invocation tokens, a plain LoRA on all tokens", _RETRAIN
        ),
        "arrow_config": Refusal("Arrow's routing between adapters is not served", "Push them one by one"),
        "kasa_config": Refusal("KaSA changes the base and adds a diagonal between A and B", _MERGE_BASE),
        "monteclora_config": Refusal("MonteCLoRA samples its weights, which is not served", _RETRAIN),
        "velora_config": Refusal("VeLoRA writes further tensors, which are not understood", _RETRAIN),
        "use_bdlora": Refusal("BD-LoRA's block-diagonal matrices are not served", _RETRAIN),
        "layer_replication": Refusal("it rebuilds the base from repeated layers", _MERGE_BASE),
        "megatron_config": Refusal("Megatron's parallel layers are not served", "Convert it to plain PEFT"),
        "enable_lora": Refusal("early PEFT's merged linear layers are not served", "Save it with PEFT 0.4 or newer"),
        "auto_map": _NO_CODE,
        "base_model_class": _NO_CODE,
        "parent_library": _NO_CODE,
        "custom_modules": _NO_CODE,
        "_custom_modules": _NO_CODE,
    }
)

# init_lora_weights, lower case; a value that PEFT does not know is refused too
HARMLESS_INITS = frozenset({"gaussian", "orthogonal", "eva"})
CHANGED_BASE_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


def refusal_of(field: str, value: Any) -> Refusal | None:
    """The refusal of `field`, if it is refused with this `value`. Unknown fields are, when they have one."""
    if field in UNDERSTOOD or field in IGNORED or is_off(value):
        return None
    if field in REFUSED:
        return REFUSED[field]
    if field.startswith(("custom_", "auto_map")):
        return _NO_CODE
    return Refusal(
        "this server does not know the field, and ignoring it could change what the adapter says",
        "Remove it if it has no effect on inference, or save the adapter with a PEFT release this server knows",
    )


def is_off(value: Any) -> bool:
    """Whether `value` means "not used": null, false, or empty."""
    return value is None or value is False or value == "" or value == [] or value == {}
