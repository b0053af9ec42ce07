"""Which base models are served, and by what name the others are refused.

Every decoder of transformers is served that routes its attention through the attention interface, keeps no state but
keys and values, and passes the proof at load. What the config tells is decided before weights are read.
"""

from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from loraplex.errors import UnsupportedModel

_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}
_FIXED_ROPE = {"default", "linear", "llama3", "yarn", "proportional"}
_FREEZABLE_ROPE = {"longrope", "dynamic"}
_INSTEAD = "Serve a decoder with plain attention, such as a Llama, Qwen, Mistral, Gemma, Phi or GPT-2 model."


def check_config(config: PretrainedConfig) -> None:
    """Raise UnsupportedModel, naming the reason and what would serve instead."""
    model_type = config.model_type
    if getattr(config, "auto_map", None):
        raise UnsupportedModel(
            "The model asks to run code of its own (auto_map in config.json). loraplex never runs a model's code; "
            "serve a checkpoint of an architecture that transformers carries itself."
        )
    if getattr(config, "quantization_config", None):
        raise UnsupportedModel(
            "The checkpoint is quantised, which this version does not serve yet. Serve the unquantised one."
        )
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        raise UnsupportedModel(
            f"'{model_type}' with an encoder or cross-attention is no decoder-only model. {_INSTEAD}"
        )
    try:
        architecture: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:
        raise UnsupportedModel(f"'{model_type}' has no causal language model in transformers. {_INSTEAD}") from None
    layer_types = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if getattr(architecture, "_is_stateful", False) or layer_types:
        kinds = f" (layers of type {', '.join(sorted(layer_types))})" if layer_types else ""
        raise UnsupportedModel(
            f"'{model_type}' keeps a recurrent state beside keys and values{kinds}, which a paged cache does not hold. "
            f"{_INSTEAD}"
        )
    if not architecture._supports_attention_backend:
        raise UnsupportedModel(
            f"'{model_type}' does not route its attention through transformers' attention interface, so its keys and "
            f"values cannot be paged. {_INSTEAD}"
        )
    for rope_type in rope_types(config):
        if rope_type not in _FIXED_ROPE | _FREEZABLE_ROPE:
            raise UnsupportedModel(
                f"'{model_type}' uses '{rope_type}' RoPE, which is not known to be the same for every request of a "
                f"batch. Known are {', '.join(sorted(_FIXED_ROPE | _FREEZABLE_ROPE))}."
            )


def rope_types(config: PretrainedConfig) -> list[str]:
    """The kinds of RoPE a config names: one, or one for each type of layer."""
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    parameters = [rope] if "rope_type" in rope else [part for part in rope.values() if isinstance(part, dict)]
    return [part.get("rope_type", "default") for part in parameters]


def check_length(config: PretrainedConfig, max_model_len: int) -> None:
    """Raise UnsupportedModel when the model is another one beyond some length below `max_model_len`."""
    chunk = getattr(config, "attention_chunk_size", None)
    if (
        chunk is not None
        and "chunked_attention" in (getattr(config, "layer_types", None) or ())
        and chunk < max_model_len
    ):
        raise UnsupportedModel(
            f"'{config.model_type}' attends within chunks of {chunk} tokens, which is not served beyond the first. "
            f"Start the server with --max-model-len {chunk} or less."
        )


def freeze_rope(model: nn.Module, max_model_len: int) -> None:
    """Make RoPE a function of the position alone.

    transformers chooses the angles of "longrope" and "dynamic" RoPE by the longest position of the whole packed batch:
    one long neighbour would change a short request's answer. longrope is frozen to the set for `max_model_len`; dynamic
    is its original self up to the original length, and refused beyond. (Source: `dynamic_rope_update`.)
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if kinds is None or not hasattr(module, "inv_freq"):
            continue
        if isinstance(kinds, dict):
            for layer_type, kind in kinds.items():
                if kind in _FREEZABLE_ROPE:
                    raise UnsupportedModel(f"'{kind}' RoPE for {layer_type} only is not served.")
        elif kinds == "longrope":
            _freeze_longrope(module, max_model_len)
        elif "dynamic" in kinds:
            original = int(module.original_max_seq_len)  # type: ignore[arg-type]
            if max_model_len > original:
                raise UnsupportedModel(
                    f"The model's dynamic RoPE changes beyond {original} tokens with the longest request of a batch, "
                    "so one request would change another's answer. Start the server with --max-model-len "
                    f"{original} or less."
                )
            module.rope_type = "default"  # type: ignore[assignment]


def _freeze_longrope(module: Any, max_model_len: int) -> None:
    original = module.config.rope_parameters["original_max_position_embeddings"]
    position = max_model_len - 1 if max_model_len > original else 0
    device = module.inv_freq.device
    module(torch.zeros(1, 1, 1, device=device), torch.tensor([[position]], device=device))
    module.rope_type = "default"
