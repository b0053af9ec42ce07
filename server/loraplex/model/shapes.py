"""read_shapes: what an adapter can change of a base, from its config alone. No weight is read or allocated."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM

from loraplex.lora.weights import ModuleShape
from loraplex.model.loader import read_config
from loraplex.model.targets import find_targets

_ATTENTION_NAME = "loraplex_shapes"


class ShapesUnknown(Exception):
    """The model's code computes with values where only shapes are there: its weights are needed."""


@dataclass(frozen=True, slots=True)
class BaseShapes:
    targets: dict[str, ModuleShape]
    model_type: str
    vocab_size: int


def read_shapes(folder: Path) -> BaseShapes:
    """Raises StartupError for what cannot be served, ShapesUnknown where the config does not suffice."""
    config = read_config(folder)
    AttentionInterface.register(_ATTENTION_NAME, _attend_to_shapes)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model = model.eval().requires_grad_(False)
        if getattr(model, "_can_set_experts_implementation", lambda: False)():
            model.set_experts_implementation("batched_mm")  # the only one whose sizes do not depend on values
        model.set_attn_implementation(_ATTENTION_NAME)
        targets = find_targets(model)
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        raise ShapesUnknown(str(error)) from error
    return BaseShapes(targets, config.model_type, model.get_input_embeddings().weight.shape[0])


def _attend_to_shapes(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs
) -> tuple[Tensor, None]:
    """query [1, Hq, T, D], value [1, Hkv, T, Dv] -> [1, T, Hq, Dv]. Without a mask: making one reads values."""
    return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None
