"""Every shape of adapter that PEFT writes, for any base: the columns of the README's matrix."""

import copy
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import torch
from peft.utils import transformers_weight_conversion
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from loraplex.lora.digest import CONFIG_NAME, WEIGHTS_NAME
from loraplex.lora.weights import ModuleShape

Targets = Mapping[str, ModuleShape]
TOKENS = [9, 3, 77]


class NoSuchShape(Exception):
    """PEFT cannot make or run this adapter for this base, or the base has nothing to put it on. Says why."""


@dataclass(frozen=True)
class Shape:
    """A column: its name, and the LoraConfig fields for a base (raises NoSuchShape). `per_expert`: the file is written
    as under transformers 4, with a LoRA on each expert's own linears."""

    name: str
    fields: Callable[[Targets], dict[str, Any]]
    per_expert: bool = False


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _of_kind(targets: Targets, kind: str) -> list[str]:
    return [name for name, shape in targets.items() if shape.kind == kind]


def attention(targets: Targets) -> list[str]:
    """Last name parts of the linears inside attention."""
    names = [name for name in _of_kind(targets, "linear") if "attn" in name or "attention" in name]
    return sorted({_last(name) for name in names})


def norms(targets: Targets) -> list[str]:
    """Last name parts of the norms."""
    leaves = [name for name in _of_kind(targets, "leaf") if "weight" in targets[name].parameters]
    return sorted({_last(name) for name in leaves if "norm" in name.lower() or "ln_" in name})


def _head(targets: Targets) -> str:
    return _last(_of_kind(targets, "head")[0])


def _embedding(targets: Targets) -> str:
    return _last(_of_kind(targets, "embedding")[0])


def _bias(targets: Targets) -> dict[str, Any]:
    if not any("bias" in shape.parameters for shape in targets.values()):
        raise NoSuchShape("no biases")
    return {"target_modules": attention(targets), "bias": "all"}


def _lora_bias(targets: Targets) -> dict[str, Any]:
    linears = _of_kind(targets, "linear")
    names = {_last(name) for name in linears if "bias" in targets[name].parameters}
    names -= {_last(name) for name in linears if "bias" not in targets[name].parameters}
    if not names:
        raise NoSuchShape("no biases")
    return {"target_modules": sorted(names), "lora_bias": True}


def _parameters(targets: Targets) -> dict[str, Any]:
    """The experts and their router where there are some, the weight of some linear elsewhere."""
    experts = sorted({_last(name) for name in _of_kind(targets, "experts")})
    if not experts:
        return {"target_modules": [], "target_parameters": [f"{_last(_of_kind(targets, 'linear')[0])}.weight"]}
    leaves = [name for name in _of_kind(targets, "leaf") if targets[name].in_features and ".layers." in name]
    routers = {".".join(name.split(".")[-2:]) + ".weight" for name in leaves if "norm" not in name}
    return {"target_modules": attention(targets), "target_parameters": [*experts, *sorted(routers)]}


def _per_expert(targets: Targets) -> dict[str, Any]:
    if not any(shape.parts for shape in targets.values()):
        raise NoSuchShape("no experts apart")
    return {"target_modules": attention(targets)}


SHAPES = [
    Shape("attention", lambda t: {"target_modules": attention(t)}),
    Shape("all-linear", lambda t: {"target_modules": "all-linear", "r": 8, "lora_alpha": 4}),
    Shape(
        "rsLoRA, patterns",
        lambda t: {
            "target_modules": attention(t),
            "use_rslora": True,
            "rank_pattern": {attention(t)[0]: 7},
            "alpha_pattern": {attention(t)[-1]: 3},
        },
    ),
    Shape("one layer", lambda t: {"target_modules": attention(t), "layers_to_transform": [1]}),
    Shape("DoRA", lambda t: {"target_modules": attention(t), "use_dora": True}),
    Shape("lora_bias", _lora_bias),
    Shape("embedding", lambda t: {"target_modules": [_embedding(t), attention(t)[0]]}),
    Shape("head", lambda t: {"target_modules": [_head(t)], "r": 5}),
    Shape("DoRA, both ends", lambda t: {"target_modules": [_embedding(t), _head(t)], "use_dora": True}),
    Shape("bias", _bias),
    Shape("saved norms", lambda t: {"target_modules": attention(t), "modules_to_save": norms(t)}),
    Shape("saved ends", lambda t: {"target_modules": attention(t), "modules_to_save": [_embedding(t), _head(t)]}),
    Shape("token rows", lambda t: {"target_modules": attention(t), "trainable_token_indices": TOKENS}),
    Shape("parameters", _parameters),
    Shape("expert by expert", _per_expert, per_expert=True),
]


def write_with_peft(shape: Shape, model: PreTrainedModel, targets: Targets, folder: Path, seed: int) -> nn.Module:
    """Make a random adapter of `shape` for `model` (which is copied), save it into `folder`, return PEFT's model.

    Raises NoSuchShape.
    """
    fields = {"r": 4, "lora_alpha": 8, **shape.fields(targets)}
    is_conv = any(targets[name].transposed for name in _of_kind(targets, "linear"))
    config = peft.LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=is_conv, **fields)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own
        try:
            made = peft.get_peft_model(copy.deepcopy(model), config)  # type: ignore[arg-type]
        except (ValueError, TypeError) as error:
            raise NoSuchShape(f"PEFT: {str(error).splitlines()[0]}") from error
        _train(made)
        made.save_pretrained(str(folder))
        if shape.per_expert:
            _keep_experts_apart(folder, targets, seed)
            # PEFT 0.21 converts such files for all kin of qwen2_moe and forgets qwen2_moe itself
            with mock.patch.dict(transformers_weight_conversion._MODEL_TO_CONVERSION_PATTERN, qwen2_moe="qwen2_moe"):
                made = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder))
    try:
        made.eval()(torch.tensor([TOKENS]))
    except AttributeError as error:
        raise NoSuchShape(f"PEFT cannot run it: {error}") from error
    return made


@torch.no_grad()
def _train(model: nn.Module) -> None:
    """Change everything that PEFT would train."""
    for name, parameter in model.named_parameters():
        if ".lora_B." in name or ".lora_embedding_A." in name:
            nn.init.normal_(parameter, std=0.3)
        elif parameter.requires_grad and (".lora_" not in name or "magnitude" in name):
            parameter.add_(torch.randn_like(parameter) * (0.3 * parameter.abs().mean() + 0.05))


def _keep_experts_apart(folder: Path, targets: Targets, seed: int) -> None:
    """Add a LoRA on every expert's own linears, as a checkpoint of transformers 4 has it."""
    config = json.loads((folder / CONFIG_NAME).read_text())
    tensors = load_file(folder / WEIGHTS_NAME)
    generator = torch.Generator().manual_seed(seed)
    names = set(config["target_modules"])
    for name, shape in targets.items():
        path = (shape.aliases[0] if shape.aliases else name).rpartition(".")[0]
        for expert in range(shape.num_experts if shape.kind == "experts" else 0):
            for part in shape.parts:
                names.add(part)
                key = f"base_model.model.{path}.{expert}.{part}"
                out_features = shape.out_features // len(shape.parts)
                tensors[f"{key}.lora_A.weight"] = torch.randn(4, shape.in_features, generator=generator) / 8
                tensors[f"{key}.lora_B.weight"] = torch.randn(out_features, 4, generator=generator) * 0.3
    # dense linears of the same names (of a shared expert) were not trained
    excluded = [name for name in _of_kind(targets, "linear") if _last(name) in names - set(config["target_modules"])]
    fields = {"target_modules": sorted(names), "exclude_modules": excluded}
    save_file(tensors, folder / WEIGHTS_NAME)
    (folder / CONFIG_NAME).write_text(json.dumps({**config, **fields}))
