"""Which base models are served, and by what name the others are refused. Decided from the config, before weights."""

from transformers import PretrainedConfig

from loraplex.errors import UnsupportedModel

SERVED_MODEL_TYPES = ("llama", "qwen2", "qwen3", "gemma2", "gpt2")
"""Architectures whose load proof and PEFT parity are tests of this project."""

_NO_ATTENTION_BACKEND = ("falcon", "bloom", "mpt", "gptj", "gpt_neo", "codegen")
_STATEFUL = (
    "mamba",
    "mamba2",
    "falcon_mamba",
    "jamba",
    "lfm2",
    "qwen3_next",
    "qwen3_5",
    "granitemoehybrid",
    "rwkv",
)
_LAYER_TYPES = {"full_attention", "sliding_attention"}
_ROPE_TYPES = {"default", "linear", "llama3", "yarn"}


def check_config(config: PretrainedConfig) -> None:
    """Raise UnsupportedModel, naming the reason and what would serve instead."""
    model_type = config.model_type
    served = ", ".join(SERVED_MODEL_TYPES)
    if getattr(config, "auto_map", None):
        raise UnsupportedModel(
            f"The model asks to run code of its own (auto_map in config.json). loraplex never runs a model's code; "
            f"serve a checkpoint of an architecture that transformers carries itself: {served}."
        )
    if model_type in _NO_ATTENTION_BACKEND:
        raise UnsupportedModel(
            f"'{model_type}' does not route its attention through transformers' attention interface, so its keys "
            f"and values cannot be paged. Served are: {served}."
        )
    if model_type in _STATEFUL:
        raise UnsupportedModel(
            f"'{model_type}' keeps a recurrent state beside keys and values, which a paged cache does not hold. "
            f"Served are: {served}."
        )
    if model_type not in SERVED_MODEL_TYPES:
        raise UnsupportedModel(
            f"'{model_type}' is not among the architectures this version has proven against PEFT: {served}."
        )
    layer_types = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if layer_types:
        raise UnsupportedModel(
            f"'{model_type}' has layers of type {', '.join(sorted(layer_types))}; only full and sliding-window "
            "attention are served."
        )
    rope = getattr(config, "rope_parameters", None) or {}
    parameters = [rope] if "rope_type" in rope else [p for p in rope.values() if isinstance(p, dict)]
    for rope_type in (p.get("rope_type", "default") for p in parameters):
        if rope_type not in _ROPE_TYPES:
            raise UnsupportedModel(
                f"'{model_type}' uses '{rope_type}' RoPE, whose angles depend on the longest sequence of the batch, "
                f"so one request would change another's answer. Served are: {', '.join(sorted(_ROPE_TYPES))}."
            )
    if getattr(config, "add_cross_attention", False) or getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"'{model_type}' with cross-attention is not a decoder-only language model.")
    if getattr(config, "quantization_config", None):
        raise UnsupportedModel(
            "The checkpoint is quantised, which this version does not serve yet. Serve the unquantised one."
        )
