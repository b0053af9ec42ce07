"""Exam: the demo's held-out prompts asked of adapters and base through a running service, all mixed."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from loraplex.demo.task import Example, Task
from loraplex.demo.tasks import TASKS
from loraplex.engine.sampling_params import SamplingParams
from loraplex.service import GenerationRequest, Service

MAX_TOKENS = 96


@dataclass(frozen=True, slots=True)
class Question:
    task: Task
    example: Example
    model: str


class Exam:
    """Every adapter of the service that has a task gets `num_prompts` held-out prompts, and so does the base."""

    def __init__(self, service: Service, num_prompts: int, seed: int = 0):
        self._service = service
        self.names = [name for name in service.catalog.names() if name in TASKS]
        questions = [
            Question(TASKS[name], example, model)
            for name in self.names
            for example in TASKS[name].held_out(num_prompts, seed)
            for model in (name, service.base_name)
        ]
        Random(seed).shuffle(questions)
        self._questions: Sequence[Question] = questions

    @property
    def num_questions(self) -> int:
        return len(self._questions)

    async def take(self, on_answer: Callable[[], object] = lambda: None) -> dict:
        """Ask everything at once; returns the table of `loraplex demo --json`."""
        started = time.perf_counter()
        answers = await asyncio.gather(*(self._ask(question, on_answer) for question in self._questions))
        seconds = time.perf_counter() - started
        stats = await self._service.stats()
        right: dict[tuple[str, bool], int] = {}
        sample: dict[str, dict[str, str]] = {}
        for question, answer in zip(self._questions, answers, strict=True):
            key = (question.task.name, question.model == self._service.base_name)
            right[key] = right.get(key, 0) + question.task.check(question.example.prompt, answer)
            if not key[1]:
                sample.setdefault(question.task.name, {"prompt": question.example.prompt, "answer": answer})
        count = max(1, len(self._questions) // (2 * max(1, len(self.names))))
        return {
            "adapters": [
                {
                    "name": name,
                    "exact_match": right[name, False] / count,
                    "base_exact_match": right[name, True] / count,
                    "prompts": count,
                    "summary": TASKS[name].summary,
                    "example": sample[name],
                }
                for name in self.names
            ],
            "num_requests": len(self._questions),
            "seconds": round(seconds, 2),
            "generated_tokens": stats.num_generated,
            "max_distinct": stats.max_distinct_adapters,
        }

    async def _ask(self, question: Question, on_answer: Callable[[], object]) -> str:
        request = GenerationRequest(
            model=question.model,
            messages=[{"role": "user", "content": question.example.prompt}],
            max_tokens=MAX_TOKENS,
            params=SamplingParams(temperature=0.0),
        )
        generation = await self._service.generate(request)
        text = "".join([delta.text async for delta in generation.deltas()])
        on_answer()
        return text
