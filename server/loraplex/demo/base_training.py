"""The base model: a small Llama that has every skill.

It uses a skill when a system message names it; told nothing, it repeats the prompt.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from rich.progress import Progress
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from loraplex.demo.corpus import base_document
from loraplex.demo.packing import Packer
from loraplex.demo.recipe import BASE_SCHEDULE, MIXTURE, SEED, SHAPE, Shape
from loraplex.demo.tokenizer import train_tokenizer
from loraplex.demo.train import train

log = logging.getLogger(__name__)


def build_tokenizer(folder: Path) -> None:
    """Train the tokenizer and write its files into the base's folder."""
    tokenizer = train_tokenizer(SHAPE.vocabulary, SHAPE.positions, SEED)
    tokenizer.save_pretrained(folder)
    log.info("tokenizer: %d tokens", len(tokenizer))


def build_base(folder: Path, work: Path, progress: Progress) -> None:
    """Train the base, from the checkpoint in `work` if there is one; write it in bfloat16."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(SEED)
    model = new_model(SHAPE, len(tokenizer))
    packer = Packer(
        tokenizer.backend_tokenizer,
        lambda rng: base_document(rng, MIXTURE),
        BASE_SCHEDULE.rows,
        BASE_SCHEDULE.row_tokens,
        seed=f"{SEED}/base",
    )
    checkpoint = work / "base.pt"
    task = progress.add_task("base", total=BASE_SCHEDULE.steps)
    for report in train(model, list(model.parameters()), BASE_SCHEDULE, packer, checkpoint):
        progress.update(task, completed=report.step, description=f"base  loss {report.loss:.3f}")
        if report.step % 100 == 0:
            log.info("base: step %d loss %.4f tokens %.1f %%", report.step, report.loss, 100 * report.accuracy)
    model.eval().bfloat16()
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder)
    # the next build starts anew
    checkpoint.unlink(missing_ok=True)


def new_model(shape: Shape, vocabulary: int) -> LlamaForCausalLM:
    """A model with fresh random weights, in float32. Eager attention: the fastest at these lengths."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.hidden // shape.heads,
        max_position_embeddings=shape.positions,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=True,
        # the order of chat.SPECIAL_TOKENS
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("eager")
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=2)
    return model


def load_base(folder: Path, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """The saved base, its bf16-rounded weights widened to `dtype`."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager", local_files_only=True)
