"""Kind: what sort of LoRA an adapter is, in the field's words. Pure Python."""

from __future__ import annotations

from collections.abc import Collection

EMBEDDING, HEAD = "embed_tokens", "lm_head"


def kind_of(targets: Collection[str], use_dora: bool, use_rslora: bool) -> str:
    """`LoRA`, `rsLoRA` or `DoRA`, and whether it reaches beyond the layers: `LoRA + embedding + head`."""
    parts = ["DoRA"] if use_dora else []
    parts += ["rsLoRA"] if use_rslora else []
    parts = parts or ["LoRA"]
    parts += ["embedding"] if EMBEDDING in targets else []
    parts += ["head"] if HEAD in targets else []
    return " + ".join(parts)


def short_names(targets: Collection[str]) -> str:
    """`q k v o gate up down embed_tokens lm_head`: those that are targeted, in the order of a forward pass."""
    order = (EMBEDDING, "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", HEAD)
    known = [name for name in order if name in targets]
    return " ".join(name.removesuffix("_proj") for name in [*known, *sorted(set(targets) - set(order))])
