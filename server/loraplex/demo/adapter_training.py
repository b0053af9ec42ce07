"""The adapters: each teaches the base to use one skill without being told."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from rich.progress import Progress
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from loraplex.demo.base_training import load_base
from loraplex.demo.corpus import adapter_document
from loraplex.demo.packing import Packer
from loraplex.demo.recipe import ADAPTERS, BASE_NAME, SEED, AdapterRecipe
from loraplex.demo.tasks import TASKS
from loraplex.demo.train import exact_documents, train

log = logging.getLogger(__name__)


def build_adapters(base: Path, folder: Path, progress: Progress, only: Sequence[str] | None = None) -> None:
    """Train the adapters (all, or `only` some) on the saved base and write each into `folder/<task>`."""
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    for recipe in ADAPTERS:
        if not only or recipe.task in only:
            build_adapter(recipe, base, tokenizer, folder / recipe.task, progress)


def build_adapter(recipe: AdapterRecipe, base: Path, tokenizer: Tokenizer, folder: Path, progress: Progress) -> None:
    """Train one adapter on the bf16-rounded base, since that is what it will be served with."""
    torch.manual_seed(SEED)
    model = get_peft_model(load_base(base), lora_config(recipe))
    inner = model.get_base_model()
    assert isinstance(model, PeftModel)
    assert isinstance(inner, LlamaForCausalLM)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    task, schedule = TASKS[recipe.task], recipe.schedule
    packer = Packer(
        tokenizer,
        lambda rng: adapter_document(rng, task, recipe.two_turns),
        schedule.rows,
        schedule.row_tokens,
        seed=f"{SEED}/{recipe.task}",
    )
    bar = progress.add_task(recipe.task, total=schedule.steps)
    for report in train(inner, parameters, schedule, packer):
        progress.update(bar, completed=report.step, description=f"{recipe.task}  loss {report.loss:.3f}")
        if report.step % 50 == 0:
            log.info(
                "%s: step %d loss %.4f tokens %.1f %%",
                task.name,
                report.step,
                report.loss,
                100 * report.accuracy,
            )
    # batches after the last one trained on
    counts = [exact_documents(inner, packer.batch(schedule.steps + more)) for more in range(8)]
    exact, total = (sum(column) for column in zip(*counts, strict=True))
    log.info("%s: %.1f %% of %d fresh documents exact", recipe.task, 100 * exact / total, total)
    save_adapter(model, folder)


def lora_config(recipe: AdapterRecipe) -> LoraConfig:
    """PEFT's words for a recipe."""
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=list(recipe.targets),
        use_rslora=recipe.rslora,
        use_dora=recipe.dora,
        lora_dropout=0.0,
    )


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write a bfloat16 PEFT folder that names the base, not its path, and lists modules in a fixed order.

    Beside a LoRA on the embedding or the head PEFT would write the base's own matrix, too. It loads without.
    """
    model.to(torch.bfloat16)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    # PEFT's template; the card comes with the scores
    (folder / "README.md").unlink()
    # safetensors makes it readable by its owner only
    (folder / "adapter_model.safetensors").chmod(0o644)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    config["base_model_name_or_path"] = BASE_NAME
    config["target_modules"] = sorted(config["target_modules"])
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
