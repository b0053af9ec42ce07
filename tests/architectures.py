"""Tiny configs of every architecture that is said to be served, and of those that are refused by name."""

from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from tiny import SHAPE, VOCAB

_HEADS = {**SHAPE, "head_dim": 32}
_PLAIN = {name: value for name, value in SHAPE.items() if name not in ("num_key_value_heads", "intermediate_size")}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 64,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
}

# name in the table -> (model_type, config, what it shows)
SERVED: dict[str, tuple[str, dict, str]] = {
    "llama": ("llama", {**SHAPE}, "grouped-query attention"),
    "llama, dynamic RoPE": (
        "llama",
        {**SHAPE, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
        "up to its original length",
    ),
    "mistral": ("mistral", {**SHAPE, "sliding_window": 24}, "sliding window"),
    "mixtral": ("mixtral", {**SHAPE, **_EXPERTS}, "experts"),
    "qwen2": ("qwen2", {**SHAPE}, "biases on q, k, v"),
    "qwen2_moe": (
        "qwen2_moe",
        {
            **SHAPE,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
        "experts and a shared one",
    ),
    "qwen3": ("qwen3", {**_HEADS}, "normed queries and keys"),
    "qwen3_moe": (
        "qwen3_moe",
        {**_HEADS, "moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2},
        "experts",
    ),
    "gemma": ("gemma", {**_HEADS}, "scaled embeddings"),
    "gemma2": ("gemma2", {**_HEADS, "sliding_window": 24, "query_pre_attn_scalar": 32}, "soft caps, mixed windows"),
    "gemma3_text": (
        "gemma3_text",
        {**_HEADS, "num_hidden_layers": 6, "sliding_window": 24, "query_pre_attn_scalar": 32},
        "two RoPEs, mixed windows",
    ),
    "gemma4_text": (
        "gemma4_text",
        {**_HEADS, "num_hidden_layers": 6, "sliding_window": 24, "vocab_size_per_layer_input": VOCAB},
        "head sizes that differ by layer",
    ),
    "phi": ("phi", {**SHAPE, "num_key_value_heads": 4}, "partial rotary"),
    "phi3": ("phi3", {**SHAPE}, "fused q, k, v and gate, up"),
    "phi3, longrope": (
        "phi3",
        {**SHAPE, "original_max_position_embeddings": 64, "rope_parameters": _LONG},
        "frozen to the server's length",
    ),
    "gpt2": (
        "gpt2",
        {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 512, "eos_token_id": 2},
        "Conv1D, learned positions",
    ),
    "gpt_neox": ("gpt_neox", {**_PLAIN, "intermediate_size": 128}, "fused query_key_value"),
    "opt": ("opt", {**_PLAIN, "ffn_dim": 128, "word_embed_proj_dim": 64}, "learned positions with an offset"),
    "olmo2": ("olmo2", {**SHAPE}, "norms after the blocks"),
    "granite": ("granite", {**SHAPE}, "scaled residuals and logits"),
    "cohere2": ("cohere2", {**SHAPE, "sliding_window": 24, "num_hidden_layers": 4}, "parallel blocks, mixed windows"),
    "starcoder2": ("starcoder2", {**SHAPE, "sliding_window": 24}, "sliding window, biases"),
    "gpt_oss": ("gpt_oss", {**_HEADS, **_EXPERTS, "sliding_window": 24}, "attention sinks, experts with biases"),
    "deepseek_v3": (
        "deepseek_v3",
        {
            **SHAPE,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 64,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "kv_lora_rank": 32,
            "q_lora_rank": 32,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 32,
            "v_head_dim": 32,
            "first_k_dense_replace": 1,
        },
        "latent attention, K and V of different sizes, experts",
    ),
    "smollm3": ("smollm3", {**SHAPE}, "layers without RoPE"),
    "glm4": ("glm4", {**_HEADS}, "fused gate, up"),
    "llama4_text": (
        "llama4_text",
        {**_HEADS, "intermediate_size_mlp": 128, "num_local_experts": 2, "num_experts_per_tok": 1},
        "within one attention chunk",
    ),
}

_OLD = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_positions": 512, "rotary_dim": 16, "eos_token_id": 2}

# Those whose attention goes through transformers' interface from its 5.24 on. Earlier ones refuse them by name.
ROUTED_LATE: dict[str, tuple[str, dict, str]] = {
    "gptj": ("gptj", {**_OLD, "n_head": 2}, "parallel blocks, partial rotary"),
    "codegen": ("codegen", {**_OLD, "n_head": 4}, "fused q, v, k in four parts"),
}

# model_type -> (config, words of the refusal)
REFUSED: dict[str, tuple[dict, tuple[str, ...]]] = {
    "falcon": ({}, ("falcon", "attention interface")),
    "bloom": ({}, ("bloom", "attention interface")),
    "mpt": ({}, ("mpt", "attention interface")),
    "gpt_neo": ({}, ("gpt_neo", "attention interface")),
    "mamba": ({}, ("mamba", "recurrent state")),
    "qwen3_next": ({}, ("qwen3_next", "recurrent state", "linear_attention")),
    "qwen3_5_text": ({}, ("qwen3_5_text", "recurrent state")),
    "lfm2": ({"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}, ("lfm2", "recurrent state", "conv")),
    "granitemoehybrid": ({}, ("granitemoehybrid", "recurrent state")),
    "t5": ({}, ("t5", "encoder")),
}

for _name, _row in ROUTED_LATE.items():
    if MODEL_FOR_CAUSAL_LM_MAPPING[type(AutoConfig.for_model(_row[0]))]._supports_attention_backend:
        SERVED[_name] = _row
    else:
        REFUSED[_row[0]] = ({}, (_row[0], "attention interface"))
