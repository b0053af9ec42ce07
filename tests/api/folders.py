"""Folders for the servers of these tests: a tiny model with a tokenizer, and adapters that PEFT wrote for it."""

import json
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tiny import make_model

CONTEXT = 256
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|pad|>", "<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "pack my box with five dozen liquor jugs",
    "né café 😀 👩‍👩‍👧 ẹ́",
] * 3


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few merges, so that characters beyond ASCII take several tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS[:2], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|pad|>", bos_token="<|bos|>", eos_token="<|eos|>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def save_base(folder: Path, context: int = CONTEXT) -> Path:
    tokenizer = make_tokenizer()
    model = make_model("llama", vocab_size=len(tokenizer), max_position_embeddings=context)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_adapter(base: Path, folder: Path, *, seed: int = 0, r: int = 4, **config) -> Path:
    """A random adapter of the base, written by PEFT."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's and transformers' own
        torch.manual_seed(seed)
        config = {"target_modules": ["q_proj", "v_proj", "down_proj"], "lora_alpha": 4 * r, **config}
        lora = LoraConfig(task_type="CAUSAL_LM", r=r, init_lora_weights=False, **config)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), lora)
        model.save_pretrained(folder)
    return folder


def peft_greedy(base: Path, adapter: Path | None, token_ids: list[int], num_tokens: int) -> list[int]:
    """What transformers and PEFT generate, without stopping at an end token."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, str(adapter))
        ids = torch.tensor([token_ids])
        with torch.inference_mode():
            for _ in range(num_tokens):
                best = model(input_ids=ids).logits[0, -1].argmax()
                ids = torch.cat([ids, best.view(1, 1)], dim=1)
    return ids[0, len(token_ids) :].tolist()


class Files:
    """An adapter's two files in memory, to be changed and uploaded."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.config = json.loads((folder / "adapter_config.json").read_text())
        self.tensors = load_file(folder / "adapter_model.safetensors")
        self.weights: bytes | None = None  # instead of the tensors
        self.weights_name = "adapter_model.safetensors"

    def parts(self, scratch: Path) -> dict[str, tuple[str, bytes]]:
        weights = self.weights
        if weights is None:
            save_file({name: t.contiguous() for name, t in self.tensors.items()}, scratch / "w.safetensors")
            weights = (scratch / "w.safetensors").read_bytes()
        return {
            "config": ("adapter_config.json", json.dumps(self.config).encode()),
            "weights": (self.weights_name, weights),
        }


def parts_of(folder: Path) -> dict[str, tuple[str, bytes]]:
    """The files of a PEFT folder as parts of an upload."""
    return {
        "config": ("adapter_config.json", (folder / "adapter_config.json").read_bytes()),
        "weights": ("adapter_model.safetensors", (folder / "adapter_model.safetensors").read_bytes()),
    }
