"""The exam, taken by a service that is played: what is asked, how much at once, and what comes of the answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loraplex.demo.exam import Exam
from loraplex.demo.tasks import TASKS

BASE = "demo-base"
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "use_dora": True}


class PlayedService:
    """Answers by `play`(model, prompt), each request after others had the chance to come."""

    base_name = BASE
    settings = SimpleNamespace(max_num_seqs=2, max_waiting=10)

    def __init__(self, folder: Path, play: Callable[[str, str], str]):
        (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
        self._folder, self._play = folder, play
        self._num_running = self.most_running = 0
        self.catalog: Any = self

    def served(self) -> list[Any]:
        facts = SimpleNamespace(target_modules=("q_proj",))
        names = ("pig", "upper", "not-of-the-demo")
        return [SimpleNamespace(name=name, digest="d", rank=4, facts=facts) for name in names]

    @contextmanager
    def hold(self, digest: str) -> Iterator[Path]:
        yield self._folder

    async def stats(self) -> Any:
        return SimpleNamespace(num_generated=7, max_distinct_adapters=2)

    async def generate(self, request: Any) -> Any:
        [message] = request.messages
        return SimpleNamespace(deltas=lambda: self._deltas(self._play(request.model, message["content"])))

    async def _deltas(self, text: str) -> AsyncIterator[Any]:
        self._num_running += 1
        self.most_running = max(self.most_running, self._num_running)
        for part in (text[:3], text[3:]):
            await asyncio.sleep(0)
            yield SimpleNamespace(text=part)
        self._num_running -= 1


def solve(model: str, prompt: str) -> str:
    return prompt if model == BASE else TASKS[model].solve(prompt)


def take(service: Any, num_prompts: int = 40) -> tuple[dict, int]:
    answered = []
    exam = Exam(service, num_prompts)
    return asyncio.run(exam.take(lambda: answered.append(1))), len(answered)


def test_right_answers_meet_the_bars(tmp_path: Path) -> None:
    service = PlayedService(tmp_path, solve)
    result, num_answered = take(service)
    assert num_answered == result["num_requests"] == 2 * 2 * 40
    assert service.most_running == 10, "as many as the queue takes, and no more"
    assert result["meets_bars"] is True
    assert [row["name"] for row in result["adapters"]] == ["pig", "upper"]
    for row in result["adapters"]:
        assert (row["exact_match"], row["base_exact_match"], row["prompts"]) == (1, 0, 40)
        assert (row["kind"], row["rank"], row["target_modules"]) == ("DoRA", 4, ["q_proj"])
        assert TASKS[row["name"]].check(row["example"]["prompt"], row["example"]["answer"])


def swapped(model: str, prompt: str) -> str:
    return solve({"pig": "upper", "upper": "pig"}.get(model, model), prompt)


def all_knowing(model: str, prompt: str) -> str:
    """A base that needs no adapter, for one of the tasks."""
    return TASKS["pig"].solve(prompt) if model == BASE else solve(model, prompt)


@pytest.mark.parametrize(
    ("play", "exact", "base"),
    [(swapped, 0.0, 0.0), (all_knowing, 1.0, 1.0)],
)
def test_wrong_answers_or_a_base_that_knows_miss_them(tmp_path: Path, play, exact: float, base: float) -> None:
    result, _ = take(PlayedService(tmp_path, play))
    assert result["meets_bars"] is False
    pig = result["adapters"][0]
    assert (pig["exact_match"], pig["base_exact_match"]) == (exact, base)
