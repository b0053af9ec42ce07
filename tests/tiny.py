"""Tiny random models and adapters: real transformers classes, a few thousand parameters, margins made wide."""

from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from loraplex.lora.weights import LoRAPair, LoRAWeights, ModuleShape, ReplacedParameter, pack

VOCAB = 128

SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

CONFIGS = {
    "llama": {**SHAPE, "tie_word_embeddings": False},
    "qwen2": {**SHAPE, "tie_word_embeddings": False},
    "qwen3": {**SHAPE, "head_dim": 32, "tie_word_embeddings": True},
    "gemma2": {**SHAPE, "head_dim": 32, "sliding_window": 24, "query_pre_attn_scalar": 32},
    "gpt2": {
        "vocab_size": VOCAB,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}

# Those that only some suites take.
MORE_CONFIGS = {
    "qwen3_moe": {**SHAPE, "head_dim": 32, "moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2},
}


def make_model(
    model_type: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **overrides
) -> PreTrainedModel:
    """A random model whose next-token margins are real: weights are scaled up so that logits spread widely."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**(CONFIGS | MORE_CONFIGS)[model_type], **overrides})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return sharpen(model).to(dtype)


def sharpen(model: PreTrainedModel) -> PreTrainedModel:
    """Redraw the weights of a random model in place, so that its logits spread and seldom come close."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                is_embedding = any(part in name for part in ("embed", "wte", "wpe", "lm_head"))
                scale = 0.5 if is_embedding else 2.0 / parameter.shape[-1] ** 0.5
                parameter.normal_(0, scale)
                if parameter.shape[0] == VOCAB:  # rows of unequal length: the best two logits seldom come close
                    parameter.mul_(torch.randn(VOCAB, 1).mul(0.7).exp())
            elif parameter.ndim == 3:  # stacked experts
                parameter.normal_(0, 2.0 / parameter.shape[-1] ** 0.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
    return model.eval().requires_grad_(False)


def save_model(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def make_adapter(
    targets: dict[str, ModuleShape],
    *,
    rank: int = 4,
    seed: int = 0,
    scaling: float = 2.0,
    only: Iterable[str] | None = None,
    kinds: Iterable[str] = ("linear",),
    dtype: torch.dtype = torch.float32,
    digest: str | None = None,
    has_vectors: bool = False,
    own: Iterable[str] = (),
) -> LoRAWeights:
    """A random adapter on the targets of these `kinds` whose last name part is in `only` (None: all). `own`: kinds of
    modules that it brings its own weight for; of an embedding, of some tokens."""
    generator = torch.Generator().manual_seed(seed)
    named = [s for n, s in targets.items() if only is None or n.rpartition(".")[2] in set(only)]
    chosen = [shape for shape in named if shape.kind in kinds]
    pairs = [
        LoRAPair(
            shape,
            torch.randn(*stack(shape), rank, shape.in_features, generator=generator) / shape.in_features**0.5,
            torch.randn(*stack(shape), shape.out_features, rank, generator=generator) * 0.3,
            scaling * shape.output_scale,
            gain=1 + 0.3 * torch.randn(shape.out_features, generator=generator) if has_vectors else None,
            shift=0.1 * torch.randn(shape.out_features, generator=generator) if has_vectors else None,
        )
        for shape in chosen
    ]
    replaced = [own_parameter(shape, generator) for shape in targets.values() if shape.kind in own]
    return pack(digest or f"{seed:064x}", pairs, dtype, replaced)


def stack(shape: ModuleShape) -> tuple[int, ...]:
    """The first size of a module's matrices: of experts their number, of others none."""
    return (shape.num_experts,) if shape.kind == "experts" else ()


def own_parameter(shape: ModuleShape, generator: torch.Generator) -> ReplacedParameter:
    if shape.kind == "leaf":
        sizes = shape.parameters["weight"]
        scale = 1.0 if len(sizes) == 1 else 2.0 / sizes[-1] ** 0.5
        return ReplacedParameter(shape, "weight", scale * torch.randn(sizes, generator=generator))
    if shape.kind == "embedding":
        rows = torch.arange(5, shape.in_features, 3)
        tensor = 0.5 * torch.randn(len(rows), shape.out_features, generator=generator)
        return ReplacedParameter(shape, "weight", tensor, rows)
    sizes = (shape.out_features, shape.in_features)
    return ReplacedParameter(shape, "weight", torch.randn(sizes, generator=generator))
