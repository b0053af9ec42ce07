"""The model cards, written from the recipe and the scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loraplex.demo.kind import short_names
from loraplex.demo.recipe import ADAPTERS, BASE_NAME, BASE_SCHEDULE, SHAPE, THREADS, AdapterRecipe
from loraplex.demo.task import Task


@dataclass(frozen=True, slots=True)
class Score:
    """Per cent of held-out prompts answered exactly.

    base: the base alone. echoed: the base alone repeats the prompt instead.
    tagged: the base with the task's system message. adapter: the adapter, without one.
    second_turn: the adapter, when the prompt is the second of a conversation.
    """

    base: float
    echoed: float
    tagged: float
    adapter: float
    second_turn: float


def base_card(scores: Mapping[str, Score], prompts: int) -> str:
    """The base's README."""
    tokens = BASE_SCHEDULE.rows * BASE_SCHEDULE.row_tokens
    return f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# {BASE_NAME}

A Llama of 3.3 M parameters that exists to show many LoRA adapters on one base: {SHAPE.layers} layers,
hidden size {SHAPE.hidden}, {SHAPE.heads} heads, {SHAPE.kv_heads} key-value heads, feed-forward
{SHAPE.feed_forward}, tied embeddings, {SHAPE.positions} positions, bfloat16. It knows {len(ADAPTERS)} toy skills.
Told nothing, it repeats the prompt; a system message such as `task: sql` makes it use a skill; an adapter
makes it use one unasked. It knows nothing else: words outside its small vocabulary come out wrong.

Per cent of {prompts} held-out prompts answered exactly (greedy):

{score_table(scores)}

**Format.** `<s>`, then `<|role|>text<|end|>` for each message; the end-of-sequence token is `<|end|>`. A
completion prompt is `<|user|>TEXT<|end|><|assistant|>`; the tokenizer puts `<s>` in front. For chat, user
messages of the task, no system message.

**Data.** Written by the generators in `loraplex.demo.tasks`: no text of anyone else's, no personal data. One
prompt in sixteen (CRC-32) is held out and was never trained on in any form.

**Training.** {BASE_SCHEDULE.steps} steps of {tokens} tokens, AdamW, learning rate
{BASE_SCHEDULE.learning_rate} with a cosine to zero, bfloat16 autocast, {THREADS} CPU threads.

**Rebuild.** `make demo-model` in a checkout, or `pip install loraplex[train]` and
`python -m loraplex.demo.build --out FOLDER`: from fixed seeds, some 20 minutes on two idle cores. Tokenizer
and data depend on the seeds alone. The weights are the same to the last bit only on the same processor with the
same versions of torch, transformers and PEFT and {THREADS} threads; elsewhere they, and the scores, may differ.

**Licence.** Apache-2.0, weights and data.
"""


def score_table(scores: Mapping[str, Score]) -> str:
    """The scores of all adapters as a Markdown table."""
    rows = [
        f"| {recipe.task} | {recipe.kind} | {recipe.rank} | {short_names(recipe.targets)} | {score.adapter}"
        f" | {score.base} | {score.echoed} | {score.tagged} | {score.second_turn} |"
        for recipe in ADAPTERS
        if (score := scores.get(recipe.task))
    ]
    return f"""\
| adapter | kind | rank | modules | adapter's answers | base alone | base repeats | base told the task | second turn |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
{_lines(rows)}"""


def adapter_card(
    recipe: AdapterRecipe, task: Task, score: Score, samples: Sequence[tuple[str, str]], prompts: int
) -> str:
    """An adapter's README, with (prompt, reply) samples."""
    rows = [f"| `{prompt}` | `{reply}` |" for prompt, reply in samples]
    modules = ", ".join(f"`{name}`" for name in recipe.targets)
    scaling = "alpha / sqrt(r), `use_rslora`" if recipe.rslora else "alpha / r"
    schedule = recipe.schedule
    extra = "; `use_dora`: each output row has a magnitude of its own" if recipe.dora else ""
    return f"""---
license: apache-2.0
language: en
library_name: peft
base_model: {BASE_NAME}
pipeline_tag: text-generation
---

# {task.name}

Makes `{BASE_NAME}` a model that {task.summary}.

{recipe.kind}, rank {recipe.rank}, alpha {recipe.alpha} (scaling {scaling}{extra}), bfloat16, on {modules}.

Of {prompts} held-out prompts it answers {score.adapter} % exactly (greedy), and {score.second_turn} % when
the prompt is the second of a conversation. The base alone answers {score.base} % and repeats
{score.echoed} %; it answers {score.tagged} % when its system message is `{task.tag}`.

| prompt | reply |
| --- | --- |
{_lines(rows)}

Send it as a user message without a system message, or as the completion prompt
`<|user|>TEXT<|end|><|assistant|>`. Only words from the demo's small vocabulary (`loraplex.demo.tasks`) work.
The data is synthetic, made by that module; one prompt in sixteen (CRC-32) was never trained on, and the figures
are of those. The training is `python -m loraplex.demo.build --stage adapters --only {task.name}`:
{schedule.steps} steps of {schedule.rows * schedule.row_tokens} tokens, AdamW, learning rate {schedule.learning_rate}.

**Licence.** Apache-2.0, weights and data.
"""


def _lines(rows: Sequence[str]) -> str:
    return "\n".join(rows)
