"""Adapters that PEFT itself wrote, on tiny random models."""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from loraplex.lora.assemble import TensorOf
from loraplex.lora.digest import CONFIG_NAME, WEIGHTS_NAME
from loraplex.lora.reader import AdapterReader
from loraplex.lora.weights import ModuleShape
from loraplex.model.targets import find_targets
from tiny import make_model


def targets_of(model: torch.nn.Module) -> dict[str, ModuleShape]:
    """What an adapter can change of `model`."""
    return find_targets(model)


@dataclass(frozen=True)
class Base:
    model_type: str
    targets: dict[str, ModuleShape]

    def model(self) -> PreTrainedModel:
        return make_model(self.model_type)


@dataclass(frozen=True)
class Adapter:
    """A PEFT folder that a test may change."""

    folder: Path
    base: Base

    @property
    def config(self) -> dict[str, Any]:
        return json.loads((self.folder / CONFIG_NAME).read_text())

    def set(self, **fields: Any) -> "Adapter":
        """Change fields of the config."""
        (self.folder / CONFIG_NAME).write_text(json.dumps({**self.config, **fields}))
        return self

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / WEIGHTS_NAME)

    def edit(self, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor] | None]) -> "Adapter":
        """Rewrite the weights; `change` gets the tensors and returns the new ones, or None after changing in place."""
        tensors = self.tensors
        changed = change(tensors)
        save_file(tensors if changed is None else changed, self.folder / WEIGHTS_NAME)
        return self

    def reader(
        self, dtype: torch.dtype = torch.float32, max_rank: int = 64, tensor_of: TensorOf | None = None
    ) -> AdapterReader:
        return AdapterReader(self.folder.parent, self.base.targets, dtype, max_rank, tensor_of)


def save_with_peft(base: Base, folder: Path, **config: Any) -> Any:
    """Write a random adapter into `folder` with PEFT; returns the PEFT model."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's and transformers' own
        torch.manual_seed(1)
        config = {"task_type": "CAUSAL_LM", "init_lora_weights": False, **config}
        model = get_peft_model(base.model(), LoraConfig(**config))
        model.save_pretrained(folder)
    return model
