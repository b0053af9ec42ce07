"""Good adapters, and what can be amiss with each: the change of its folder, and words that the refusal must say.

What no reader can see in the files, because another adapter would look exactly so (only running the adapter tells):

- tensors of one shape that were exchanged: q_proj's with o_proj's, one layer's with another's; A and B of a square
  module whose rank is its size
- changed numbers: weights, lora_alpha, alpha_pattern; use_rslora switched
- trained token rows in another order than the indices; other indices of the same number
- an adapter of another base of the same shapes, unless it carries a copy of the base's embedding or head
- an edited target_modules that selects the same modules; bias "lora_only" read as "all" where it is the same
- alpha_pattern with several keys for one module: PEFT sorts them when it writes, and the first counts (a note says so)
- the matrices of a head under ensure_weight_tying that differ from the embedding's: with a bfloat16 base PEFT itself
  trains them apart, so each is taken as it stands
- modules_to_save that PEFT wrote untrained, as long as anything else in the file has an effect
"""

from collections.abc import Callable
from typing import Any

import torch
from peft_folders import Adapter
from variants import EXPERTS, PREFIX, QV, TOKENS, Tensors, make_base

Q0 = f"{PREFIX}model.layers.0.self_attn.q_proj"
V1 = f"{PREFIX}model.layers.1.self_attn.v_proj"
EXPERTS0 = f"{PREFIX}model.layers.0.mlp.experts"
OLD0 = f"{PREFIX}model.layers.0.block_sparse_moe.experts"

GOOD = {
    "plain": ("llama", {"target_modules": QV}),
    "patterns": ("llama", {"target_modules": QV, "rank_pattern": {"v_proj": 2}}),
    "ends": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    "DoRA": ("llama", {"target_modules": QV, "use_dora": True}),
    "lora_bias": ("qwen2", {"target_modules": QV, "lora_bias": True}),
    "bias all": ("qwen2", {"target_modules": QV, "bias": "all"}),
    "bias lora_only": ("qwen2", {"target_modules": QV, "bias": "lora_only"}),
    "saved": ("llama", {"target_modules": QV, "modules_to_save": ["norm", "lm_head"]}),
    "saved Conv1D": ("gpt2", {"target_modules": ["c_fc"], "fan_in_fan_out": True, "modules_to_save": ["c_attn"]}),
    "tokens": ("llama", {"target_modules": QV, "trainable_token_indices": TOKENS}),
    "tied": ("qwen2-tied", {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
    "saved, tied": (
        "qwen2-tied",
        {"target_modules": QV, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "saved head": ("qwen2-tied", {"target_modules": QV, "modules_to_save": ["lm_head"]}),
    "experts": ("qwen3_moe", {"target_modules": ["o_proj"], "target_parameters": EXPERTS}),
    "old experts": ("mixtral", {}),
}

Change = Callable[[Adapter], object]


def drop(*words: str) -> Change:
    """Without the tensors whose keys have all these words."""
    return lambda adapter: adapter.edit(
        lambda tensors: {key: one for key, one in tensors.items() if not all(word in key for word in words)}
    )


def rename(old: str, new: str) -> Change:
    return lambda adapter: adapter.edit(lambda tensors: {key.replace(old, new): one for key, one in tensors.items()})


def put(key: str, value: Callable[[Tensors], torch.Tensor]) -> Change:
    return lambda adapter: adapter.edit(lambda tensors: {**tensors, key: value(tensors).clone().contiguous()})


def alter(key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return put(key, lambda tensors: change(tensors[key]))


def setting(**fields: Any) -> Change:
    return lambda adapter: adapter.set(**fields)


def spoiled(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor.index_fill(0, torch.tensor([1]), value)


def swap_a_and_b(tensors: Tensors) -> Tensors:
    return {
        key.replace("lora_A", "lora_X").replace("lora_B", "lora_A").replace("lora_X", "lora_B"): one
        for key, one in tensors.items()
    }


def grown(key: str, rows: int) -> Change:
    return alter(key, lambda tensor: torch.cat([tensor, tensor[:rows]]))


FAULTS: dict[str, tuple[str, Change, tuple[str, ...]]] = {
    # the matrices
    "A and B swapped": ("plain", lambda a: a.edit(swap_a_and_b), ("lora_A", "[64, 4]", "[4, 64]")),
    "A transposed": ("plain", alter(f"{Q0}.lora_A.weight", lambda t: t.T), ("q_proj.lora_A", "[64, 4]", "[4, 64]")),
    "B transposed": ("plain", alter(f"{V1}.lora_B.weight", lambda t: t.T), ("v_proj.lora_B", "[4, 32]", "[32, 4]")),
    "A flat": ("plain", alter(f"{Q0}.lora_A.weight", lambda t: t.reshape(-1)), ("q_proj.lora_A", "[256]")),
    "A missing": ("plain", drop(Q0, "lora_A"), ("layers.0.self_attn.q_proj", "lacks lora_A")),
    "B missing": ("plain", drop(V1, "lora_B"), ("layers.1.self_attn.v_proj", "lacks lora_B")),
    "a pair missing": ("plain", drop("layers.1", "v_proj"), ("selects", "layers.1.self_attn.v_proj", "no tensors")),
    "a surplus pair": ("plain", rename("v_proj", "k_proj"), ("k_proj", "does not select")),
    "a surplus half": (
        "plain",
        put(f"{Q0[:-6]}k_proj.lora_A.weight", lambda t: torch.ones(4, 64)),
        ("k_proj", "does not select"),
    ),
    "NaN": ("plain", alter(f"{Q0}.lora_A.weight", spoiled(float("nan"))), (f"{Q0}.lora_A.weight", "NaN")),
    "infinity": ("plain", alter(f"{V1}.lora_B.weight", spoiled(float("inf"))), (f"{V1}.lora_B.weight", "infinity")),
    "every B zero": (
        "plain",
        lambda a: a.edit(lambda ts: {key: one * ("lora_A" in key) for key, one in ts.items()}),
        ("without effect", "lora_B"),
    ),
    "int8": ("plain", alter(f"{Q0}.lora_A.weight", lambda t: t.to(torch.int8)), (f"{Q0}.lora_A", "I8", "F32")),
    "float64": ("plain", alter(f"{Q0}.lora_A.weight", lambda t: t.double()), (f"{Q0}.lora_A", "F64", "F32")),
    # the names
    "no prefix": ("plain", rename(PREFIX, ""), ("model.layers.0", "base_model.model.<module>")),
    "half a prefix": ("plain", rename(PREFIX, "base_model."), ("base_model.model.layers.0", "Did you mean")),
    "a model. too many": ("plain", rename(PREFIX, "base_model.model.model."), ("model.model.layers", "Did you mean")),
    "a wrapper's prefix": (
        "plain",
        rename("model.layers", "model.language_model.layers"),
        ("language_model", "Did you mean"),
    ),
    "two adapters in one file": (
        "plain",
        rename("v_proj.lora_A.", "v_proj.lora_A.other."),
        ("several adapters", "other"),
    ),
    "one tensor twice": (
        "plain",
        put(f"{Q0}.lora_A.default.weight", lambda t: t[f"{Q0}.lora_A.weight"]),
        ("both lora_A of one module",),
    ),
    "a layer too many": (
        "plain",
        rename("layers.1.", "layers.2."),
        ("layers.2.self_attn", "no LoRA module of this base"),
    ),
    # the config
    "another rank": ("plain", setting(r=8), ("q_proj.lora_A", "rank 8", "[8, 64]", "rank_pattern")),
    "rank_pattern lost": ("patterns", setting(rank_pattern={}), ("v_proj.lora_A", "[2, 64]", "rank 4")),
    "rank_pattern of another": (
        "patterns",
        setting(rank_pattern={"v_proj": 3}),
        ("v_proj.lora_A", "[2, 64]", "rank 3"),
    ),
    "alpha absurd": ("plain", setting(lora_alpha=10**6), ("q_proj", "scaling", "1024", "lora_alpha")),
    "alpha zero": ("plain", setting(lora_alpha=0), ("no effect", "lora_alpha")),
    "target_modules too few": (
        "plain",
        setting(target_modules=["q_proj"]),
        ("v_proj", "does not select", "target_modules"),
    ),
    "target_modules too many": ("plain", setting(target_modules=[*QV, "o_proj"]), ("o_proj", "no tensors")),
    "a layer left out": ("plain", setting(layers_to_transform=[0]), ("layers.1", "layers_to_transform")),
    "all excluded": ("plain", setting(exclude_modules=r".*"), ("does not select", "exclude_modules")),
    **{
        f"initialised by {init}": (
            "plain",
            setting(init_lora_weights=init),
            ("init_lora_weights", init, "weights were changed"),
        )
        for init in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "mica")
    },
    "an initialisation to come": ("plain", setting(init_lora_weights="zeta"), ("init_lora_weights", "zeta")),
    "a field to come": ("plain", setting(use_zeta=True), ("use_zeta", "does not know the field")),
    "aLoRA": ("plain", setting(alora_invocation_tokens=[5]), ("alora_invocation_tokens", "aLoRA")),
    "QALoRA": ("plain", setting(use_qalora=True), ("use_qalora", "QALoRA")),
    "layer_replication": (
        "plain",
        setting(layer_replication=[[0, 2], [1, 2]]),
        ("layer_replication", "repeated layers"),
    ),
    "no target_modules": ("plain", setting(target_modules=None), ("target_modules", "act on nothing")),
    "another task": ("plain", setting(task_type="SEQ_CLS"), ("task_type", "SEQ_CLS", "CAUSAL_LM")),
    # DoRA, biases
    "magnitude missing": ("DoRA", drop(Q0, "magnitude"), ("q_proj", "lacks lora_magnitude_vector")),
    "magnitude too long": ("DoRA", grown(f"{Q0}.lora_magnitude_vector", 1), ("magnitude_vector", "[65]", "[64]")),
    "DoRA read as LoRA": ("DoRA", setting(use_dora=False), ("lora_magnitude_vector", "use_dora")),
    "LoRA read as DoRA": ("plain", setting(use_dora=True), ("q_proj", "lacks lora_magnitude_vector")),
    "lora_bias switched off": ("lora_bias", setting(lora_bias=False), ("lora_B.bias", "lora_bias")),
    "lora_bias switched on": ("plain", setting(lora_bias=True), ("q_proj", "lacks lora_B.bias")),
    "biases that the config denies": (
        "bias all",
        setting(bias="none"),
        ("bias", "adapter_config.json does not name it"),
    ),
    "a bias missing": ("bias all", drop("layers.1.self_attn.k_proj.bias"), ("bias='all'", "layers.1.self_attn.k_proj")),
    "all biases missing": (
        "bias lora_only",
        drop("base_layer.bias"),
        ("bias='lora_only'", "q_proj", "PEFT before 0.21"),
    ),
    "too few biases for all": ("bias lora_only", setting(bias="all"), ("bias='all'", "k_proj")),
    "a bias too long": ("bias all", grown(f"{Q0}.base_layer.bias", 1), ("q_proj.base_layer.bias", "[65]", "[64]")),
    # saved modules
    "a saved norm that the config forgot": (
        "saved",
        setting(modules_to_save=["lm_head"]),
        ("norm.weight", "modules_to_save"),
    ),
    "a saved head that the config forgot": (
        "saved",
        setting(modules_to_save=["norm"]),
        ("lm_head.weight", "modules_to_save"),
    ),
    "a saved module missing": ("saved", drop("model.norm"), ("model.norm", "lacks its weight")),
    "a saved norm too long": ("saved", grown(f"{PREFIX}model.norm.weight", 1), ("model.norm.weight", "[65]", "[64]")),
    "a saved head of more rows": (
        "saved",
        grown(f"{PREFIX}lm_head.weight", 2),
        ("lm_head.weight", "130 rows", "vocabulary"),
    ),
    "a saved module and what holds it": (
        "saved Conv1D",
        setting(modules_to_save=["attn"]),
        ("transformer.h.0.attn.c_attn", "transformer.h.0.attn'", "which holds it"),
    ),
    "saved and with a LoRA": (
        "saved",
        setting(modules_to_save=["norm", "lm_head", "proj"]),
        ("q_proj", "has a LoRA too"),
    ),
    "NaN in a saved norm": (
        "saved",
        alter(f"{PREFIX}model.norm.weight", spoiled(float("nan"))),
        ("model.norm.weight", "NaN"),
    ),
    "nothing trained but the base's norms": (
        "saved",
        lambda a: a.edit(untrained_norms),
        ("without effect", "lora_B"),
    ),
    # rows of tokens
    "fewer rows than indices": (
        "tokens",
        setting(trainable_token_indices=[*TOKENS, 5]),
        ("trainable_tokens_delta", "3 rows"),
    ),
    "an index beyond the vocabulary": (
        "tokens",
        setting(trainable_token_indices=[9, 3, 128]),
        ("token 128", "this base has 128"),
    ),
    "an index twice": (
        "tokens",
        setting(trainable_token_indices=[9, 3, 9]),
        ("trainable_token_indices", "no token twice"),
    ),
    "rows that the config forgot": (
        "tokens",
        setting(trainable_token_indices=None),
        ("trainable_tokens_delta", "trainable_token_indices"),
    ),
    "rows of another module": (
        "tokens",
        setting(trainable_token_indices={"q_proj": TOKENS}),
        ("q_proj", "neither the input"),
    ),
    "rows missing": ("tokens", drop("token_adapter"), ("model.embed_tokens", "trainable_token_indices", "has none")),
    # another base
    "another base's embedding": (
        "ends",
        alter(f"{PREFIX}model.embed_tokens.base_layer.weight", lambda t: t + 0.01),
        ("embed_tokens.base_layer.weight", "another base"),
    ),
    "a larger vocabulary": ("ends", lambda a: a.edit(resized), ("130", "128")),
    "a tied head missing": ("tied", drop("lm_head", "lora_"), ("lm_head", "ensure_weight_tying")),
    "a tied saved head missing": (
        "saved, tied",
        drop("lm_head"),
        ("lm_head", "ensure_weight_tying", "lacks its weight"),
    ),
    "a tied saved head of its own": (
        "saved, tied",
        alter(f"{PREFIX}lm_head.weight", lambda t: t + 1),
        ("lm_head", "embed_tokens", "the same in training"),
    ),
    "a tied embedding missing": ("tied", drop("embed_tokens", "lora_"), ("model.embed_tokens", "ensure_weight_tying")),
    "a head alone that should be tied": (
        "saved head",
        setting(ensure_weight_tying=True),
        ("model.embed_tokens", "ensure_weight_tying", "lacks its weight"),
    ),
    "a module named by both": (
        "plain",
        setting(target_parameters=["q_proj.weight"]),
        ("q_proj", "target_parameters and target_modules", "PEFT refuses that too"),
    ),
    "a dot that excludes everything": ("plain", setting(modules_to_save=["."]), ("q_proj", "does not select")),
    # experts
    "experts without B": ("experts", drop(f"{EXPERTS0}.lora_B"), ("layers.0.mlp.experts.down_proj", "lora_B")),
    "a layer's experts missing": ("experts", drop("layers.1.mlp.experts"), ("layers.1.mlp.experts", "no lora_A")),
    "an expert too few": (
        "experts",
        alter(f"{EXPERTS0}.lora_A.weight", lambda t: t[:-4].clone()),
        ("mlp.experts.lora_A", "4 experts", "[12, 64]"),
    ),
    "experts' rank_pattern": (
        "experts",
        setting(rank_pattern={"down_proj": 2}),
        ("mlp.experts.lora_A", "rank 2 on 4 experts"),
    ),
    "one experts' parameter forgotten": (
        "experts",
        setting(target_parameters=["down_proj"]),
        ("experts.base_layer", "no LoRA module"),
    ),
    "experts with DoRA": ("experts", setting(use_dora=True), ("mlp.experts", "use_dora")),
    "whole stacks of experts": (
        "experts",
        put(f"{EXPERTS0}.down_proj", lambda t: torch.ones(4, 64, 64)),
        ("experts.down_proj", "[4, 64, 64]", "stacks of experts"),
    ),
    "an old expert's pair missing": ("old experts", drop(f"{OLD0}.2.w2"), ("experts.2.w2", "all 4 experts")),
    "old gate without up": ("old experts", drop(".w3."), ("experts.0.w3", "w1 and w3")),
    "an old layer's experts missing": (
        "old experts",
        drop("layers.1.block", ".w2"),
        ("layers.1.mlp.experts.down_proj", "some layers"),
    ),
    "an old expert too many": ("old experts", rename("experts.3.", "experts.4."), ("experts.3.", "all 4 experts")),
    "old experts of two ranks": ("old experts", setting(rank_pattern={"0.w1": 2}), ("different ranks",)),
    "old experts with rsLoRA": ("old experts", setting(use_rslora=True), ("experts", "use_rslora")),
}


def untrained_norms(tensors: Tensors) -> Tensors:
    base = make_base("llama")
    kept = {key: one * ("lora_B" not in key) for key, one in tensors.items()}
    own = {key: base.get_parameter(key.removeprefix(PREFIX)).clone() for key in kept if ".lora_" not in key}
    return kept | own


def resized(tensors: Tensors) -> Tensors:
    """As PEFT writes it after resize_token_embeddings."""
    rows = {PREFIX + name for name in ("model.embed_tokens.base_layer.weight", "lm_head.base_layer.weight")}
    return {key: torch.cat([one, one[:2]]) if key in rows else one for key, one in tensors.items()}
