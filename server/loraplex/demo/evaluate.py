"""Scores on held-out prompts: greedy generation, exact match."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.progress import Progress
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from loraplex.demo.base_training import load_base
from loraplex.demo.cards import Score, adapter_card, base_card
from loraplex.demo.chat import END, conversation, question
from loraplex.demo.recipe import ADAPTERS
from loraplex.demo.task import Task
from loraplex.demo.tasks import TASKS

log = logging.getLogger(__name__)

PROMPTS = 256
# The longest answer has 39 tokens, its end included.
NEW_TOKENS = 48


def evaluate(base: Path, adapters: Path, scores_file: Path, progress: Progress) -> dict[str, Score]:
    """Score every adapter that exists; write the scores and the model cards."""
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    recipes = [recipe for recipe in ADAPTERS if (adapters / recipe.task / "adapter_config.json").exists()]
    bar = progress.add_task("evaluate", total=len(recipes))
    scores: dict[str, Score] = {}
    for recipe in recipes:
        task = TASKS[recipe.task]
        model = load_base(base, torch.bfloat16)
        plain, tagged, continued = held_out_texts(task)
        base_answers = generate(model, tokenizer, plain)
        tagged_answers = generate(model, tokenizer, tagged)
        adapted = PeftModel.from_pretrained(model, str(adapters / recipe.task))
        answers = generate(adapted, tokenizer, plain)
        second_answers = generate(adapted, tokenizer, continued)
        prompts = _prompts(task)
        echoes = sum(answer == prompt for prompt, answer in zip(prompts, base_answers, strict=True))
        scores[task.name] = Score(
            base=share_right(task, base_answers),
            echoed=round(100 * echoes / PROMPTS, 1),
            tagged=share_right(task, tagged_answers),
            adapter=share_right(task, answers),
            second_turn=share_right(task, second_answers),
        )
        log.info("%s: %s", task.name, scores[task.name])
        samples = list(zip(prompts, answers, strict=True))[:4]
        card = adapter_card(recipe, task, scores[task.name], samples, PROMPTS)
        (adapters / recipe.task / "README.md").write_text(card)
        progress.advance(bar)
    table = {"prompts": PROMPTS, "tasks": {name: asdict(score) for name, score in scores.items()}}
    scores_file.write_text(json.dumps(table, indent=2) + "\n")
    (base / "README.md").write_text(base_card(scores, PROMPTS))
    return scores


def held_out_texts(task: Task) -> tuple[list[str], list[str], list[str]]:
    """Texts to complete for each held-out prompt: alone, with the task's tag, and as the second turn."""
    prompts = _prompts(task)
    first = [(example.prompt, example.answer) for example in task.held_out(PROMPTS, seed=1)]
    continued = [
        "".join(piece.text for piece in conversation([turn, (prompt, "")])).removesuffix(END)
        for turn, prompt in zip(first, prompts, strict=True)
    ]
    return (
        [question(prompt) for prompt in prompts],
        [question(prompt, task.tag) for prompt in prompts],
        continued,
    )


@torch.inference_mode()
def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    batch: int = 64,
) -> list[str]:
    """Complete texts greedily with a transformers or PEFT model (no common class), `batch` at a time.

    Padding is on the left; the texts carry their own `<s>`.
    """
    answers: list[str] = []
    for start in range(0, len(texts), batch):
        inputs = tokenizer(
            list(texts[start : start + batch]), add_special_tokens=False, padding=True, return_tensors="pt"
        )
        output = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
        answers += tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def share_right(task: Task, answers: Sequence[str]) -> float:
    """Per cent of the held-out prompts that `answers` answers."""
    prompts = _prompts(task)
    right = sum(task.check(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True))
    return round(100 * right / len(prompts), 1)


def _prompts(task: Task) -> list[str]:
    return [example.prompt for example in task.held_out(PROMPTS)]
