"""The training loop, one for the base and its adapters."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from loraplex.demo.packing import IGNORED, Batch, Packer
from loraplex.demo.recipe import Schedule

# Rows of logits are padded to a multiple of this, again for the sake of few shapes.
_LABEL_ROWS = 128


@dataclass(frozen=True, slots=True)
class Report:
    """After a step: its number (from 1), its loss, and the share of label tokens predicted exactly."""

    step: int
    loss: float
    accuracy: float


def learning_rate(schedule: Schedule, step: int) -> float:
    """Linear warm-up, then a cosine to zero at the last step."""
    if step < schedule.warmup:
        return schedule.learning_rate * (step + 1) / schedule.warmup
    done = (step - schedule.warmup) / max(1, schedule.steps - schedule.warmup)
    return schedule.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def logits_and_labels(model: LlamaForCausalLM, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """([n, vocabulary], [n]) of the label positions alone, n padded with IGNORED labels."""
    chosen = (batch.labels.flatten() != IGNORED).nonzero().squeeze(1)
    padding = -len(chosen) % _LABEL_ROWS
    labels = F.pad(batch.labels.flatten()[chosen], (0, padding), value=IGNORED)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_bias(),
            position_ids=batch.positions,
            use_cache=False,
        ).last_hidden_state
        logits = model.lm_head(hidden.flatten(0, 1)[F.pad(chosen, (0, padding))])
    return logits.float(), labels


def train(
    model: LlamaForCausalLM,
    parameters: list[torch.nn.Parameter],
    schedule: Schedule,
    packer: Packer,
    checkpoint: Path | None = None,
    checkpoint_every: int = 200,
) -> Iterator[Report]:
    """Run the schedule, a step each time the caller asks for the next; from the checkpoint, if any."""
    optimizer = _optimizer(parameters, schedule)
    start = 0
    if checkpoint is not None and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    model.train()
    for step in range(start, schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(schedule, step)
        logits, labels = logits_and_labels(model, packer.batch(step))
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, schedule.clip)
        optimizer.step()
        optimizer.zero_grad()
        hits = (logits.argmax(-1) == labels).sum() / (labels != IGNORED).sum()
        if checkpoint is not None and (step + 1) % checkpoint_every == 0:
            _save(
                checkpoint,
                {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1},
            )
        yield Report(step + 1, loss.item(), hits.item())


@torch.no_grad()
def exact_documents(model: LlamaForCausalLM, batch: Batch) -> tuple[int, int]:
    """(exact documents, documents): exact if every label is the argmax, a cheap stand-in for generation."""
    model.eval()
    logits, labels = logits_and_labels(model, batch)
    real = labels != IGNORED
    rows = torch.arange(len(batch.segments))[:, None] * batch.segments.shape[1]
    documents = (batch.segments + rows)[batch.labels != IGNORED]
    wrong = documents[(logits.argmax(-1) != labels)[real]]
    total = len(documents.unique())
    model.train()
    return total - len(wrong.unique()), total


def _optimizer(parameters: list[torch.nn.Parameter], schedule: Schedule) -> torch.optim.AdamW:
    # vectors are norms: they are not decayed
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": schedule.weight_decay},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=schedule.betas, fused=True)


def _save(path: Path, state: dict) -> None:
    """Write beside, then rename: an interrupted save leaves the older checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)
