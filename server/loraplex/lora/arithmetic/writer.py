"""write_adapter: a Draft as a PEFT folder, read back before it counts as written."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from loraplex.lora.arithmetic.checkpoint import Checkpoint
from loraplex.lora.arithmetic.draft import Draft
from loraplex.lora.arithmetic.factors import Factors
from loraplex.lora.arithmetic.source import Source, opened
from loraplex.lora.digest import CONFIG_NAME, WEIGHTS_NAME
from loraplex.lora.keys import PREFIX
from loraplex.lora.peft import PeftConfig
from loraplex.lora.rules import ModuleRules

_DEFAULTS: Mapping[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": None,
    "bias": "none",
    "lora_dropout": 0.0,
    "fan_in_fan_out": False,
    "modules_to_save": None,
}


def write_adapter(
    draft: Draft, folder: Path, base: Checkpoint | None = None, dtype: torch.dtype = torch.float32
) -> int:
    """Write `draft` into the empty `folder`, A and B in `dtype`, and read it as a server would; returns the bytes of
    the weights. Raises AdapterInvalid for what no reader would take: an adapter without effect, or with NaN."""
    tensors: dict[str, Tensor] = dict(draft.tensors)
    for name, factors in draft.factors.items():
        tensors |= {key: one.to(dtype) for key, one in _tensors(name, draft, factors).items()}
    document = _document(draft)
    (folder / CONFIG_NAME).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    contiguous = {key: tensor.contiguous() for key, tensor in sorted(tensors.items())}
    save_file(contiguous, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    for name, data in draft.texts.items():
        (folder / name).write_bytes(data)
    with opened(folder, base) as written:
        _check(draft, written)
    return (folder / WEIGHTS_NAME).stat().st_size


def _check(draft: Draft, written: Source) -> None:
    ranks = {name: module.rank for name, module in written.modules.items()}
    assert ranks == {name: factors.rank for name, factors in draft.factors.items()}, "what was written reads otherwise"
    assert all(module.scaling == 1 for module in written.modules.values()), "scaling is in the matrices"


def _tensors(name: str, draft: Draft, factors: Factors) -> dict[str, Tensor]:
    """A and B by PEFT's keys, in PEFT's layouts."""
    shape = draft.shapes[name]
    if shape.kind == "embedding":
        return {f"{PREFIX}{name}.lora_embedding_A": factors.a, f"{PREFIX}{name}.lora_embedding_B": factors.b}
    if shape.kind != "experts":
        return {f"{PREFIX}{name}.lora_A.weight": factors.a, f"{PREFIX}{name}.lora_B.weight": factors.b}
    # PEFT's ParamWrapper: one around the other, the first parameter innermost; A holds the experts one after the
    # other, B has them innermost
    stack = name.rpartition(".")[0]
    others = [one for one in draft.shapes if one.rpartition(".")[0] == stack and draft.shapes[one].kind == "experts"]
    path = PREFIX + stack + ".base_layer" * (len(others) - 1 - others.index(name))
    a = factors.a.reshape(-1, shape.in_features)
    b = factors.b.permute(1, 2, 0).reshape(shape.out_features, -1)
    return {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}


def _document(draft: Draft) -> dict[str, Any]:
    """adapter_config.json. Scaling is 1 everywhere: alpha is the rank."""
    document: dict[str, Any] = {**_DEFAULTS, **draft.fields}
    rank = max(factors.rank for factors in draft.factors.values())
    document |= {"r": rank, "lora_alpha": rank, "use_rslora": False, "init_lora_weights": True, "inference_mode": True}
    document |= {"rank_pattern": {}, "alpha_pattern": {}}
    rules = ModuleRules(PeftConfig.from_bytes(json.dumps(document).encode()))
    names = {name: f"{name}.weight" if rules.selects_parameter(f"{name}.weight") else name for name in draft.factors}
    ranks = {names[name]: factors.rank for name, factors in draft.factors.items() if factors.rank != rank}
    return document | {"rank_pattern": ranks, "alpha_pattern": dict(ranks)}
