"""A random Llama of 124.7 M parameters and random adapters: speed does not depend on what the weights are.

The shape of DESIGN's CPU bars, and of the peers' measurements. Weights are drawn from seeds, so that two machines, or
two servers on one, run the very same model.
"""

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from loraplex.lora.weights import LoRAPair, LoRAWeights, ModuleShape, pack

VOCAB_SIZE = 32000
ALPHA_PER_RANK = 2


def random_llama(dtype: torch.dtype, device: torch.device | str = "cpu", **overrides: Any) -> PreTrainedModel:
    """hidden 768, 12 layers, 12 heads (4 for keys and values), feed-forward 2048, 32000 tokens, untied. Drawn on
    `device`: a CPU takes minutes for billions of weights. Two devices draw different ones."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "initializer_range": 0.03,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    with torch.device(device):
        return AutoModelForCausalLM.from_config(LlamaConfig(**{**shape, **overrides}), dtype=dtype)


def letters_tokenizer(vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose tokens beyond the bytes are all words of two, three and four letters in order: a token is
    text of its own, so a server has something to send for (almost) every one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|end|>": 0} | {letter: index for index, letter in enumerate(alphabet, 1)}
    merges: list[tuple[str, str]] = []
    words = itertools.chain.from_iterable(itertools.product(ascii_lowercase, repeat=length) for length in (2, 3, 4))
    for word in itertools.islice(words, vocab_size - len(vocab)):
        text = "".join(word)
        vocab[text] = len(vocab)
        merges.append((text[:-1], text[-1]))
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|end|>", eos_token="<|end|>")


def save_random_base(folder: Path, dtype: torch.dtype = torch.bfloat16, **overrides: Any) -> Path:
    """A model folder as `loraplex serve` and other servers take it."""
    model = random_llama(dtype, **overrides)
    model.save_pretrained(folder)
    letters_tokenizer(model.config.vocab_size).save_pretrained(folder)
    return folder


def random_pairs(targets: Iterable[ModuleShape], rank: int, seed: int) -> list[LoRAPair]:
    """A ~ N(0, 0.02), B ~ N(0, 0.04) on every linear but the output head."""
    generator = torch.Generator().manual_seed(seed)
    return [
        LoRAPair(
            shape,
            torch.randn(rank, shape.in_features, generator=generator) * 0.02,
            torch.randn(shape.out_features, rank, generator=generator) * 0.04,
            float(ALPHA_PER_RANK),
        )
        for shape in targets
        if shape.kind == "linear"
    ]


def random_adapter(targets: Iterable[ModuleShape], rank: int, seed: int, dtype: torch.dtype) -> LoRAWeights:
    """In memory, for a runner; the digest is made of seed and rank."""
    return pack(f"{rank << 32 | seed:064x}", random_pairs(targets, rank, seed), dtype)


def save_random_adapter(targets: Iterable[ModuleShape], rank: int, seed: int, dtype: torch.dtype, folder: Path) -> Path:
    """The same as a PEFT folder."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = random_pairs(targets, rank, seed)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": ALPHA_PER_RANK * rank,
        "target_modules": sorted({pair.shape.name.rpartition(".")[2] for pair in pairs}),
        "fan_in_fan_out": any(pair.shape.transposed for pair in pairs),
    }
    tensors = {}
    for pair in pairs:
        prefix = f"base_model.model.{pair.shape.name}"
        tensors[f"{prefix}.lora_A.weight"] = pair.a.to(dtype)
        tensors[f"{prefix}.lora_B.weight"] = pair.b.to(dtype).contiguous()
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder
