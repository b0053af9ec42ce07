"""Training documents, all drawn from the training side of the split."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from loraplex.demo.chat import Piece, conversation, raw
from loraplex.demo.recipe import Mixture
from loraplex.demo.task import Task
from loraplex.demo.tasks import TASKS


def base_document(rng: Random, mixture: Mixture) -> list[Piece]:
    """One document for the base: plain text, an untagged prompt echoed, or a tagged prompt answered."""
    names = [name for name, _ in mixture.weights]
    task = TASKS[rng.choices(names, [weight for _, weight in mixture.weights])[0]]
    turns = 2 if rng.random() < mixture.two_turns else 1
    kind = rng.random()
    if kind < mixture.raw:
        return raw(task.sample(rng).prompt)
    if kind < mixture.raw + mixture.echo:
        # every prompt form as often as any other: the tasks' weights say what is hard to answer, not to echo
        prompts = [TASKS[rng.choice(names)].sample(rng).prompt for _ in range(turns)]
        return conversation([(prompt, prompt) for prompt in prompts])
    return conversation(_turns(rng, task, turns), system=task.tag)


def adapter_document(rng: Random, task: Task, two_turns: float) -> list[Piece]:
    """One document for an adapter: its prompts, untagged, answered."""
    return conversation(_turns(rng, task, 2 if rng.random() < two_turns else 1))


def tokenizer_texts(rng: Random, count: int) -> Iterator[str]:
    """Prompts and answers of every task in turn."""
    for _ in range(count):
        for task in TASKS.values():
            example = task.sample(rng)
            yield example.prompt
            yield example.answer


def _turns(rng: Random, task: Task, count: int) -> list[tuple[str, str]]:
    examples = [task.sample(rng) for _ in range(count)]
    return [(example.prompt, example.answer) for example in examples]
