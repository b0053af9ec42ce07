"""Exam: the demo's held-out prompts asked of adapters and base through a running service, all mixed."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from loraplex.demo.kind import kind_of
from loraplex.demo.task import Example, Task
from loraplex.demo.tasks import TASKS
from loraplex.engine.sampling_params import SamplingParams
from loraplex.lora.peft import PeftConfig
from loraplex.lora.version import Version
from loraplex.service import GenerationRequest, Service

MAX_TOKENS = 96
# Shares of prompts answered exactly: what an adapter of the demo must reach, and what the base alone may not exceed.
ADAPTER_BAR, BASE_BAR = 0.95, 0.30


@dataclass(frozen=True, slots=True)
class Question:
    task: Task
    example: Example
    model: str


class Exam:
    """Every adapter of the service that has a task gets `num_prompts` held-out prompts, and so does the base."""

    def __init__(self, service: Service, num_prompts: int, seed: int = 0):
        self._service = service
        self._versions = {version.name: version for version in service.catalog.served() if version.name in TASKS}
        self.names = list(self._versions)
        questions = [
            Question(TASKS[name], example, model)
            for name in self.names
            for example in TASKS[name].held_out(num_prompts, seed)
            for model in (name, service.base_name)
        ]
        Random(seed).shuffle(questions)
        # At once: enough to mix every batch, and no more than the server's queue takes.
        self._places = asyncio.Semaphore(min(8 * service.settings.max_num_seqs, service.settings.max_waiting))
        self._questions: Sequence[Question] = questions

    @property
    def num_questions(self) -> int:
        return len(self._questions)

    async def take(self, on_answer: Callable[[], object] = lambda: None) -> dict:
        """Ask everything, as much at once as the service takes; returns the table of `loraplex demo --json`."""
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
        rows = [
            {
                "name": name,
                **self._shape(version),
                "exact_match": right[name, False] / count,
                "base_exact_match": right[name, True] / count,
                "prompts": count,
                "summary": TASKS[name].summary,
                "example": sample[name],
            }
            for name, version in self._versions.items()
        ]
        return {
            "adapters": rows,
            "bars": {"exact_match": ADAPTER_BAR, "base_exact_match": BASE_BAR},
            "meets_bars": all(
                row["exact_match"] >= ADAPTER_BAR and row["base_exact_match"] <= BASE_BAR for row in rows
            ),
            "num_requests": len(self._questions),
            "seconds": round(seconds, 2),
            "generated_tokens": stats.num_generated,
            "max_distinct": stats.max_distinct_adapters,
        }

    def _shape(self, version: Version) -> dict:
        """Kind, rank and target modules, from the files that are served."""
        with self._service.catalog.hold(version.digest) as folder:
            config = PeftConfig.from_bytes((folder / "adapter_config.json").read_bytes())
        modules = list(version.facts.target_modules)
        return {
            "kind": kind_of(modules, config.use_dora, config.use_rslora),
            "rank": version.rank,
            "target_modules": modules,
        }

    async def _ask(self, question: Question, on_answer: Callable[[], object]) -> str:
        request = GenerationRequest(
            model=question.model,
            messages=[{"role": "user", "content": question.example.prompt}],
            max_tokens=MAX_TOKENS,
            params=SamplingParams(temperature=0.0),
        )
        async with self._places:
            generation = await self._service.generate(request)
            text = "".join([delta.text async for delta in generation.deltas()])
        on_answer()
        return text
