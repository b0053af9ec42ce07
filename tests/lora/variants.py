"""Good adapters in every form that PEFT writes, on tiny bases: the fields, and how their files came about."""

import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import tiny
from architectures import SERVED
from loraplex.lora.digest import CONFIG_NAME, WEIGHTS_NAME

TOKENS = [9, 3, 77]
"""Ids in no order, whose rows are trained; every prompt has them."""
PREFIX = "base_model.model."

Tensors = dict[str, torch.Tensor]
Write = Callable[[PreTrainedModel, dict[str, Any], Path], nn.Module]


@dataclass(frozen=True)
class Variant:
    """An adapter with these LoraConfig fields. `write` makes it, saves it into the folder and returns what answers as
    it does."""

    name: str
    fields: dict[str, Any] = field(default_factory=dict)
    write: Write | None = None


def make_base(name: str) -> PreTrainedModel:
    """ "llama", "llama-tied", … and every row of the table of architectures."""
    kind, _, tied = name.partition("-")
    if kind in tiny.CONFIGS:
        return tiny.make_model(kind, **({"tie_word_embeddings": True} if tied else {}))
    model_type, config, _ = SERVED[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config), dtype=torch.float32)
    return tiny.sharpen(model)


def write_variant(variant: Variant, base: PreTrainedModel, folder: Path, seed: int = 0) -> nn.Module:
    """Save the adapter; returns PEFT's model of it, or what equals that."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own
        return (variant.write or plain)(copy.deepcopy(base), variant.fields, folder).eval()


def plain(model: PreTrainedModel, fields: dict[str, Any], folder: Path) -> nn.Module:
    made = trained(model, fields)
    made.save_pretrained(str(folder))
    return made


def trained(model: nn.Module, fields: dict[str, Any]) -> Any:
    """A PEFT model whose every trainable number was changed."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 8, **fields})
    made = peft.get_peft_model(model, config)  # type: ignore[arg-type]
    train(made)
    return made


@torch.no_grad()
def train(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if ".lora_B." in name and name.endswith("weight") or ".lora_embedding_A." in name:
            nn.init.normal_(parameter, std=0.3)
        elif parameter.requires_grad and (".lora_" not in name or "magnitude" in name or name.endswith("bias")):
            parameter.add_(torch.randn_like(parameter) * (0.3 * parameter.abs().mean() + 0.05))


def edited(change: Callable[[Tensors], Tensors]) -> Write:
    """PEFT writes the file, `change` rewrites its tensors; answers as PEFT's model that was loaded from the file."""

    def write(model: PreTrainedModel, fields: dict[str, Any], folder: Path) -> nn.Module:
        original = copy.deepcopy(model)
        plain(model, fields, folder)
        tensors = change(load_file(folder / WEIGHTS_NAME))
        save_file(tensors, folder / WEIGHTS_NAME)
        return peft.PeftModel.from_pretrained(original, str(folder))

    return write


def as_type(dtype: torch.dtype) -> Write:
    return edited(lambda tensors: {key: tensor.to(dtype) for key, tensor in tensors.items()})


def saved_with(**options: Any) -> Write:
    """With further arguments of save_pretrained."""

    def write(model: PreTrainedModel, fields: dict[str, Any], folder: Path) -> nn.Module:
        made = trained(model, fields)
        made.save_pretrained(str(folder), **options)
        return made

    return write


def compiled(model: PreTrainedModel, fields: dict[str, Any], folder: Path) -> nn.Module:
    """Under torch.compile, which puts _orig_mod. into the names. Nothing is compiled before a call."""
    made = trained(torch.compile(model), fields)  # type: ignore[arg-type]
    made.save_pretrained(str(folder))
    assert any("_orig_mod." in key for key in load_file(folder / WEIGHTS_NAME))
    return made.base_model.model._orig_mod


def with_adapter_names(model: PreTrainedModel, fields: dict[str, Any], folder: Path) -> nn.Module:
    """The trainer's own state dict, in which the adapter's name stands."""
    made = plain(model, fields, folder)
    tensors = {key: tensor.contiguous() for key, tensor in made.state_dict().items() if ".lora_" in key}
    assert all(".default" in key for key in tensors)
    save_file(tensors, folder / WEIGHTS_NAME)
    return made


def as_second_adapter(model: PreTrainedModel, fields: dict[str, Any], folder: Path) -> nn.Module:
    """One of two adapters of a PEFT model, saved into a folder of its own."""
    made = trained(model, {"target_modules": ["q_proj"]})
    made.add_adapter("second", peft.LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 8, **fields}))
    made.set_adapter("second")
    train(made)
    made.save_pretrained(str(folder.parent / f"{folder.name}-both"), selected_adapters=["second"])
    (folder.parent / f"{folder.name}-both" / "second").rename(folder)
    return made


def expert_by_expert(is_alone: bool = False, **fields: Any) -> Write:
    """A file of transformers 4, for mixtral: a LoRA on each expert's own linears, under the paths of that time, with
    `fields` in the config; beside one on q_proj, or `is_alone`. Answers as a base into which they were added."""
    config = peft.LoraConfig(**fields)
    linears = {"w1": (64, 128), "w3": (64, 128), "w2": (128, 64)}

    def write(model: PreTrainedModel, others: dict[str, Any], folder: Path) -> nn.Module:
        made = plain(model, {"target_modules": ["q_proj"], **others}, folder)
        tensors = {} if is_alone else load_file(folder / WEIGHTS_NAME)
        if is_alone:
            made = made.unload()
        for layer, block in enumerate(made.get_decoder().layers):
            for expert in range(4):
                for part, (in_features, out_features) in linears.items():
                    name = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}"
                    rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, name), 4)
                    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, name), 8)
                    a, b = torch.randn(rank, in_features) / 8, torch.randn(out_features, rank) * 0.3
                    tensors |= {f"{PREFIX}{name}.lora_A.weight": a, f"{PREFIX}{name}.lora_B.weight": b}
                    delta = alpha / rank * (b @ a)
                    with torch.no_grad():
                        if part == "w2":
                            block.mlp.experts.down_proj[expert] += delta
                        else:
                            block.mlp.experts.gate_up_proj[expert].view(2, 128, 64)[int(part == "w3")] += delta
        save_file(tensors, folder / WEIGHTS_NAME)
        patterns = {"rank_pattern": config.rank_pattern, "alpha_pattern": config.alpha_pattern}
        set_fields(folder, target_modules=[*linears] if is_alone else ["q_proj", *linears], **patterns)
        return made

    return write


def set_fields(folder: Path, **fields: Any) -> None:
    """Change fields of the config."""
    path = folder / CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


QV = ["q_proj", "v_proj"]
EXPERTS = ["gate_up_proj", "down_proj"]
CONV = {"fan_in_fan_out": True}

LLAMA = [
    Variant("rank 1", {"target_modules": QV, "r": 1}),
    Variant("rank beyond the features", {"target_modules": QV, "r": 100}),
    Variant("negative alpha", {"target_modules": QV, "lora_alpha": -8}),
    Variant("regex", {"target_modules": r".*layers\.(0|1)\.(self_attn\.[qk]|mlp\.up)_proj"}),
    Variant("all-linear", {"target_modules": "all-linear"}),
    Variant("excluded", {"target_modules": "all-linear", "exclude_modules": ["v_proj", "layers.0.mlp.up_proj"]}),
    Variant(
        "one layer by its list",
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    ),
    Variant(
        "a layer and a whole name",
        {"target_modules": ["q_proj", "model.layers.0.mlp.up_proj"], "layers_to_transform": 1},
    ),
    Variant(
        "DoRA, rsLoRA, patterns",
        {
            "target_modules": [*QV, "down_proj"],
            "use_dora": True,
            "use_rslora": True,
            "rank_pattern": {"v_proj": 3},
            "alpha_pattern": {"down_proj": 1, r"layers\.0\..*q_proj": 5},
        },
    ),
    Variant("gaussian", {"target_modules": QV, "init_lora_weights": "gaussian"}),
    Variant("orthogonal", {"target_modules": QV, "init_lora_weights": "orthogonal"}),
    Variant("EVA", {"target_modules": QV, "init_lora_weights": "eva", "eva_config": peft.EvaConfig()}),
    Variant("bfloat16", {"target_modules": QV}, as_type(torch.bfloat16)),
    Variant("float16", {"target_modules": QV}, as_type(torch.float16)),
    Variant("torch.compile", {"target_modules": QV}, compiled),
    Variant("torch.compile, saved head", {"target_modules": QV, "modules_to_save": ["lm_head"]}, compiled),
    Variant("adapter's name in the keys", {"target_modules": QV}, with_adapter_names),
    Variant("the second of two", {"target_modules": ["k_proj"]}, as_second_adapter),
    Variant("the base's ends beside it", {"target_modules": QV}, saved_with(save_embedding_layers=True)),
    Variant("nothing to tie", {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
    Variant("lora_bias where the base has none", {"target_modules": QV, "lora_bias": True}),
    Variant("the wrong fan_in_fan_out", {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True, **CONV}),
]
QWEN2 = [
    Variant("bias all", {"target_modules": QV, "bias": "all"}),
    Variant("bias all, DoRA", {"target_modules": QV, "bias": "all", "use_dora": True}),
    Variant("bias all, lora_bias", {"target_modules": QV, "bias": "all", "lora_bias": True}),
    Variant("bias lora_only", {"target_modules": ["q_proj", "o_proj"], "bias": "lora_only"}),
    Variant("bias lora_only, DoRA", {"target_modules": ["q_proj", "o_proj"], "bias": "lora_only", "use_dora": True}),
    Variant("bias lora_only, lora_bias", {"target_modules": ["q_proj"], "bias": "lora_only", "lora_bias": True}),
    Variant("norms by their ending", {"target_modules": QV, "modules_to_save": ["norm"]}),
    Variant("saved attention", {"target_modules": ["up_proj"], "modules_to_save": ["self_attn"]}),
    Variant("a whole layer", {"target_modules": ["q_proj"], "modules_to_save": ["layers.1"]}),
    Variant(
        "saved attention, bias all", {"target_modules": QV, "modules_to_save": ["layers.0.self_attn"], "bias": "all"}
    ),
    Variant("saved linear and embedding", {"target_modules": QV, "modules_to_save": ["up_proj", "embed_tokens"]}),
    Variant("saved head", {"target_modules": QV, "modules_to_save": ["lm_head"]}),
    Variant("token rows", {"target_modules": QV, "trainable_token_indices": TOKENS}),
    Variant(
        "token rows of both",
        {"target_modules": QV, "trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": [5, 4]}},
    ),
    Variant(
        "token rows, saved head",
        {"target_modules": QV, "trainable_token_indices": TOKENS, "modules_to_save": ["lm_head"]},
    ),
    Variant(
        "token rows, LoRA on the head", {"target_modules": ["q_proj", "lm_head"], "trainable_token_indices": TOKENS}
    ),
    Variant("a linear's parameter", {"target_modules": [], "target_parameters": ["q_proj.weight"]}),
    Variant(
        "a parameter, bias lora_only",
        {"target_modules": ["v_proj"], "target_parameters": ["q_proj.weight"], "bias": "lora_only"},
    ),
]
TIED = [
    Variant("saved embedding", {"target_modules": QV, "modules_to_save": ["embed_tokens"]}),
    Variant(
        "saved embedding, tied",
        {"target_modules": QV, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    Variant("saved head, tied", {"target_modules": QV, "modules_to_save": ["lm_head"], "ensure_weight_tying": True}),
    Variant("saved head", {"target_modules": QV, "modules_to_save": ["lm_head"]}),
    Variant("LoRA on the embedding", {"target_modules": ["embed_tokens", "q_proj"]}),
    Variant("LoRA, tied", {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
    Variant("LoRA by a regex, tied", {"target_modules": ".*(embed_tokens|q_proj)", "ensure_weight_tying": True}),
    Variant(
        "LoRA, tied, patterns",
        {
            "target_modules": ["lm_head", "q_proj"],
            "ensure_weight_tying": True,
            "rank_pattern": {"embed_tokens": 2},
            "alpha_pattern": {"lm_head": 3},
        },
    ),
    Variant(
        "DoRA, tied", {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True, "ensure_weight_tying": True}
    ),
    Variant("token rows", {"target_modules": QV, "trainable_token_indices": TOKENS}),
    Variant(
        "token rows of both",
        {"target_modules": QV, "trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": [5, 4]}},
    ),
    Variant(
        "one list for both",
        {"target_modules": QV, "trainable_token_indices": {"lm_head": TOKENS, "embed_tokens": TOKENS}},
    ),
    Variant("token rows of the head", {"target_modules": QV, "trainable_token_indices": {"lm_head": TOKENS}}),
]
GPT2 = [
    Variant(
        "bias all, DoRA, rsLoRA",
        {"target_modules": ["c_attn", "c_fc"], "bias": "all", "use_dora": True, "use_rslora": True, **CONV},
    ),
    Variant("bias all, saved norm", {"target_modules": ["c_attn"], "bias": "all", "modules_to_save": ["ln_f"], **CONV}),
    Variant("saved Conv1D and positions", {"target_modules": ["c_fc"], "modules_to_save": ["c_attn", "wpe"], **CONV}),
    Variant(
        "tied by PEFT only for a head that is named",
        {"target_modules": ["c_fc", "lm_head"], "ensure_weight_tying": True, **CONV},
    ),
    Variant(
        "not tied, since it is called wte", {"target_modules": ["c_fc", "wte"], "ensure_weight_tying": True, **CONV}
    ),
    Variant("token rows", {"target_modules": ["c_fc"], "trainable_token_indices": TOKENS, **CONV}),
]
PHI = [
    Variant("LoRA on a head with a bias", {"target_modules": ["lm_head"]}),
    Variant("the same, bias all", {"target_modules": ["lm_head"], "bias": "all"}),
    Variant("saved head, bias all", {"target_modules": QV, "bias": "all", "modules_to_save": ["lm_head"]}),
    Variant("token rows beside a head with a bias", {"target_modules": QV, "trainable_token_indices": TOKENS}),
]
MOE = [
    Variant("experts alone", {"target_modules": [], "target_parameters": EXPERTS}),
    Variant("one parameter", {"target_modules": ["o_proj"], "target_parameters": ["experts.down_proj"]}),
    Variant(
        "one layer's parameter", {"target_modules": [], "target_parameters": ["layers.1.mlp.experts.gate_up_proj"]}
    ),
    Variant(
        "patterns on experts",
        {
            "target_modules": ["o_proj"],
            "target_parameters": EXPERTS,
            "use_rslora": True,
            "rank_pattern": {r"layers\.0\..*gate_up_proj": 3, "o_proj": 2},
            "alpha_pattern": {"layers.1.mlp.experts.down_proj": 5},
        },
    ),
    Variant("all-linear", {"target_modules": "all-linear"}),
    Variant("bias all", {"target_modules": ["o_proj"], "target_parameters": EXPERTS, "bias": "all"}),
]


def _router(name: str) -> list[Variant]:
    weight = f"{name}.weight"
    return [
        Variant("router", {"target_modules": ["o_proj"], "target_parameters": [weight], "bias": "lora_only"}),
        Variant("saved router", {"target_modules": ["o_proj"], "modules_to_save": [name]}),
    ]


GOOD = {
    "llama": LLAMA,
    "qwen2": QWEN2,
    "qwen2-tied": TIED,
    "gemma2": TIED,
    "gpt2": GPT2,
    "phi": PHI,
    "qwen3_moe": [
        *MOE,
        *_router("gate"),
        Variant("old names", {"target_modules": ["o_proj", "gate_proj", "up_proj", "down_proj"]}),
    ],
    "gpt_oss": [*MOE, *_router("router")],
    "mixtral": [
        Variant("expert by expert", {}, expert_by_expert()),
        Variant("experts one by one and alone", {}, expert_by_expert(is_alone=True)),
        Variant("with old paths in the patterns", {}, expert_by_expert(rank_pattern={r".*block_sparse_moe.*": 2})),
        Variant("with an old path's alpha", {}, expert_by_expert(alpha_pattern={r"experts\.\d\.w[13]": 24})),
    ],
    "qwen2_moe": [*MOE, *_router("gate")],
    "deepseek_v3": [
        *MOE[:2],
        MOE[4],
        Variant("saved router with its buffer", {"target_modules": ["o_proj"], "modules_to_save": ["gate"]}),
    ],
}
