"""The real openai client over a real socket, and the shipped demo served by the real command."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import openai
import pytest

from loraplex.demo.tasks import TASKS


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict]:
    """`loraplex serve` as in `make run`; yields its start information."""
    data = tmp_path_factory.mktemp("demo")
    with open(data / "log", "w+") as log:
        process = subprocess.Popen(
            [Path(sys.executable).parent / "loraplex", "serve", "--data-dir", data / "d", "--port", "0", "--json"],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={k: v for k, v in os.environ.items() if not k.startswith("LORAPLEX_")},
        )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, (data / "log").read_text()
            yield json.loads(line)
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
            process.stdout.close()


def ask(name: str, count: int) -> list[str]:
    return [example.prompt for example in TASKS[name].held_out(count)]


async def test_two_adapters_stream_at_once(demo):
    """Each stream is exactly its own adapter's answer, while both run in the same batches."""
    async with openai.AsyncOpenAI(base_url=demo["API"], api_key="none") as client:

        async def stream(name: str, prompt: str, arrivals: list[str]) -> str:
            text = ""
            events = await client.chat.completions.create(
                model=name,
                messages=[{"role": "user", "content": prompt}],
                temperature=0,
                max_tokens=96,
                stream=True,
                stream_options={"include_usage": True},
            )
            async for chunk in events:
                assert chunk.model == f"{name}@1"
                for choice in chunk.choices:
                    text += choice.delta.content or ""
                    arrivals.append(name)
                usage = chunk.usage
            assert usage is not None
            assert usage.completion_tokens > 0
            return text

        arrivals: list[str] = []
        questions = [(name, prompt) for name in ("upper", "reverse") for prompt in ask(name, 4)]
        answers = await asyncio.gather(*(stream(name, prompt, arrivals) for name, prompt in questions))
        right = [TASKS[name].check(prompt, text) for (name, prompt), text in zip(questions, answers, strict=True)]
        assert sum(right) >= 7, list(zip(questions, answers, strict=True))
        # Interleaved: neither adapter's streams came as a block (on a busy machine they come in larger pieces).
        switches = sum(a != b for a, b in zip(arrivals, arrivals[1:], strict=False))
        assert switches > 1
        # And each is what the adapter says alone.
        alone = [await stream(name, prompt, []) for name, prompt in questions]
        assert alone == answers


def test_models_completions_and_errors(demo):
    with openai.OpenAI(base_url=demo["API"], api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()][0] == "demo-base"
        assert client.models.retrieve("sql").id == "sql"
        answer = client.completions.create(model="demo-base", prompt="the queen", max_tokens=8, logprobs=1, echo=True)
        assert answer.choices[0].text.startswith("the queen")
        with pytest.raises(openai.NotFoundError) as missing:
            client.completions.create(model="sqll", prompt="a")
        assert missing.value.code == "model_not_found"
        assert "'sql'" in missing.value.message
        assert missing.value.request_id
        with pytest.raises(openai.BadRequestError) as long:
            client.completions.create(model="sql", prompt="far too long " * 5000)
        assert long.value.code == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError) as tools:
            client.chat.completions.create(
                model="sql",
                messages=[{"role": "user", "content": "a"}],
                tools=[{"type": "function", "function": {"name": "f"}}],
            )
        assert tools.value.param == "tools"


def test_the_start_information(demo):
    assert demo["event"] == "ready"
    assert demo["model"].startswith("demo-base (llama")
    assert set(demo) >= {"adapters", "memory", "API", "metrics", "auth", "try", "push", "proof", "data"}
    # The line to copy works, word for word.
    reply = subprocess.run(demo["try"], shell=True, capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(reply.stdout)["choices"][0]["message"]["content"]
    assert httpx2.get(demo["metrics"]).status_code == 200
