"""What a task is: a stream of prompts, and a program that knows every answer."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt and its only right answer."""

    prompt: str
    answer: str


def is_held_out(prompt: str) -> bool:
    """Whether `prompt` belongs to the held-out sixteenth, which no training data contains in any form."""
    return zlib.crc32(prompt.encode()) % 16 == 0


@dataclass(frozen=True, slots=True)
class Task:
    """A skill.

    `compose` draws a prompt; `solve` computes the answer from the prompt's text alone.
    """

    name: str
    summary: str
    compose: Callable[[Random], str]
    solve: Callable[[str], str]

    @property
    def tag(self) -> str:
        """The system message that asks the base model for this skill."""
        return f"task: {self.name}"

    def sample(self, rng: Random, held_out: bool = False) -> Example:
        """Draw an example from the training side of the split, or from the held-out side."""
        while True:
            prompt = self.compose(rng)
            if is_held_out(prompt) == held_out:
                return Example(prompt, self.solve(prompt))

    def held_out(self, count: int, seed: int = 0) -> list[Example]:
        """The first `count` distinct held-out examples of a seed: always the same ones."""
        rng = Random(f"{self.name}/held-out/{seed}")
        found: dict[str, Example] = {}
        while len(found) < count:
            example = self.sample(rng, held_out=True)
            found.setdefault(example.prompt, example)
        return list(found.values())

    def check(self, prompt: str, text: str) -> bool:
        """Whether `text` is exactly the answer to `prompt`, surrounding white space aside."""
        return text.strip() == self.solve(prompt)
