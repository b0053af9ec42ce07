"""All adapters of the demo and its base at once, with too little room for them, while clients leave and adapters come
and go: every answer is the one that the same request gets alone, to the last bit, and the right adapter's by its task.
"""

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random

import httpx2
import pytest
from folders import Files, parts_of
from live import LiveServer
from test_api_life import connect

from loraplex.config import Settings
from loraplex.demo.paths import BASE_FOLDER
from loraplex.demo.tasks import TASKS

ADAPTERS = Path(__file__).parents[2] / "adapters"
BASE = "base"
SENTENCES = ("upper", "reverse", "pig", "velna")  # one prompt suits them all, and they answer it differently
PROMPTS = 12
CLIENTS = 16
# What `swap` is: its odd versions and its even ones.
SWAPPED = ("reverse", "pig")


@dataclass(frozen=True)
class Question:
    model: str
    prompt: str


@dataclass(frozen=True)
class Answer:
    """`tokens`: each with its logprob, as JSON carries it: all digits of the float."""

    model: str
    text: str
    tokens: tuple[tuple[str, float], ...]

    @property
    def said(self) -> tuple:
        return self.text, self.tokens


def body_of(question: Question) -> dict:
    messages = [{"role": "user", "content": question.prompt}]
    return {"model": question.model, "messages": messages, "temperature": 0, "max_tokens": 48, "logprobs": True}


def ask(client: httpx2.Client, question: Question) -> Answer:
    reply = client.post("/v1/chat/completions", json=body_of(question))
    assert reply.status_code == 200, reply.text
    reply = reply.json()
    [choice] = reply["choices"]
    tokens = tuple((token["token"], token["logprob"]) for token in choice["logprobs"]["content"])
    return Answer(reply["model"], choice["message"]["content"], tokens)


def ask_streaming(client: httpx2.Client, question: Question) -> Answer:
    model, text, tokens = "", "", []
    with client.stream("POST", "/v1/chat/completions", json={**body_of(question), "stream": True}) as reply:
        assert reply.status_code == 200, reply.read()
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    for chunk in map(json.loads, lines):
        assert "error" not in chunk, chunk
        model = chunk["model"]
        [choice] = chunk["choices"]
        text += choice["delta"].get("content") or ""
        if choice["logprobs"] is not None:
            tokens += [(token["token"], token["logprob"]) for token in choice["logprobs"]["content"]]
    return Answer(model, text, tuple(tokens))


def questions() -> list[Question]:
    """Every adapter its held-out prompts, and the base all of them."""
    asked = []
    sentences = [example.prompt for example in TASKS["upper"].held_out(PROMPTS, seed=5)]
    for models, prompts in (
        (SENTENCES, sentences),
        *(((name,), [e.prompt for e in TASKS[name].held_out(PROMPTS, seed=5)]) for name in ("json", "sql")),
    ):
        asked += [Question(model, prompt) for model in (*models, BASE) for prompt in prompts]
    return asked


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    settings = Settings.load(
        {
            "model": BASE_FOLDER,
            "served_model_name": BASE,
            "adapters": ADAPTERS,
            "data_dir": tmp_path_factory.mktemp("data"),
            "device": "cpu",
            "dtype": "float32",
            "threads": 1,
            "max_loras": 3,
            "adapter_cache_bytes": 2 << 20,  # all six need about 3 MiB
            "kv_cache_bytes": 1 << 20,  # 512 tokens: not enough for a full batch
            "max_model_len": 128,
            "max_num_seqs": CLIENTS,
            "max_num_batched_tokens": 64,
        }
    )
    with LiveServer(settings) as server:
        yield server
        server.check_at_rest()


@pytest.fixture(scope="module")
def alone(server: LiveServer) -> dict[Question, Answer]:
    """Each question's answer when nothing else runs."""
    return {question: ask(server.client, question) for question in questions()}


def push(client: httpx2.Client, name: str, parts: dict) -> str:
    reply = client.post("/v1/adapters", data={"name": name}, files=parts)
    assert reply.status_code == 201, reply.text
    return reply.json()["id"]


class Storm:
    """`rounds` times every question, in a random order, half of them streamed; and what goes on beside."""

    def __init__(self, server: LiveServer, alone: dict[Question, Answer], scratch: Path):
        self._server, self._alone, self._scratch = server, alone, scratch
        self._is_over = threading.Event()
        self.num_aborted = 0
        self.num_pushed = 0
        self.num_swapped = 0

    def run(self, rounds: int = 2, seed: int = 7) -> None:
        rng = Random(seed)
        push(self._server.client, "swap", parts_of(ADAPTERS / SWAPPED[0]))
        asked = [(question, number % 2 == 0) for question in self._alone for number in range(rounds)]
        asked += [(Question("swap", question.prompt), rng.random() < 0.5) for question in self._swappable]
        rng.shuffle(asked)
        with ThreadPoolExecutor(CLIENTS) as pool, ThreadPoolExecutor(3) as beside:
            disturbing = [beside.submit(work) for work in (self._leave, self._come_and_go, self._swap)]
            try:
                for done in [pool.submit(self._check, *one) for one in asked]:
                    done.result()
            finally:
                self._is_over.set()
            for done in disturbing:
                done.result()

    @property
    def _swappable(self) -> list[Question]:
        return [question for question in self._alone if question.model == SWAPPED[0]]

    def _check(self, question: Question, is_streamed: bool) -> None:
        answer = (ask_streaming if is_streamed else ask)(self._server.client, question)
        name, _, version = answer.model.partition("@")
        assert name == question.model
        if name == "swap":
            question = Question(SWAPPED[(int(version) - 1) % 2], question.prompt)
        elif name != BASE:
            assert version == "1"
        expected = self._alone[question]
        assert answer.text == expected.text, f"{answer.model} was asked {question.prompt!r}"
        if self._server.service.info.is_batch_invariant:
            assert answer.tokens == expected.tokens, f"{answer.model} was asked {question.prompt!r}"

    def _leave(self) -> None:
        """Clients that go away while they wait, while their prompt is read or while they are answered."""
        rng = Random(11)
        asked = list(self._alone)
        while not self._is_over.is_set():
            body = {**body_of(rng.choice(asked)), "ignore_eos": True, "max_tokens": 64, "stream": rng.random() < 0.5}
            with connect(self._server, body, "/v1/chat/completions"):
                time.sleep(rng.random() * 0.1)
            self.num_aborted += 1

    def _come_and_go(self) -> None:
        """An adapter that is asked once and deleted, and a second name for the files of one that is in use."""
        client = self._server.client
        stranger, prompt = Files(ADAPTERS / "json"), self._swappable[0].prompt
        while not self._is_over.is_set():
            self.num_pushed += 1
            stranger.tensors = {name: tensor * -0.5 for name, tensor in stranger.tensors.items()}
            push(client, "stranger", stranger.parts(self._scratch))
            ask(client, Question("stranger", prompt))
            push(client, "twin", parts_of(ADAPTERS / "upper"))
            twin = ask(client, Question("twin", prompt))
            assert twin.said == self._alone[Question("upper", prompt)].said
            for name in ("stranger", "twin"):
                assert client.delete(f"/v1/adapters/{name}").status_code == 200

    def _swap(self) -> None:
        """A name whose newest version is now one adapter, now the other; the version before is deleted under way."""
        client, version = self._server.client, 1
        while not self._is_over.wait(0.05):
            version += 1
            pushed = push(client, "swap", parts_of(ADAPTERS / SWAPPED[(version - 1) % 2]))
            assert pushed == f"swap@{version}"
            self._check(self._swappable[version % PROMPTS], version % 4 < 2)
            self._check(Question("swap", self._swappable[version % PROMPTS].prompt), version % 4 >= 2)
            assert client.delete(f"/v1/adapters/swap@{version - 1}").status_code == 200
            self.num_swapped += 1


def test_alone_each_adapter_does_its_task(alone: dict[Question, Answer]):
    for name, task in TASKS.items():
        answers = [(question, answer) for question, answer in alone.items() if question.model == name]
        right = sum(task.check(question.prompt, answer.text) for question, answer in answers)
        assert right >= 0.95 * len(answers) >= 0.95 * PROMPTS
    for question, answer in alone.items():
        if question.model == BASE:
            is_sentence = Question("upper", question.prompt) in alone
            assert not any(TASKS[name].check(question.prompt, answer.text) for name in SENTENCES if is_sentence)


def test_in_a_storm_every_answer_is_the_right_adapters(
    server: LiveServer, alone: dict[Question, Answer], tmp_path: Path
):
    before = server.stats
    storm = Storm(server, alone, tmp_path)
    storm.run()
    after = server.stats
    # It was one: adapters went in and out of RAM and of the batches, sequences were preempted, prefixes were shared.
    assert after.max_distinct_adapters == server.settings.max_loras < len(TASKS)
    assert after.num_ram_evictions - before.num_ram_evictions >= len(TASKS)
    assert after.num_loads - before.num_loads >= len(TASKS)
    assert after.num_preemptions > before.num_preemptions
    assert after.prefix_hits > before.prefix_hits
    assert min(storm.num_aborted, storm.num_pushed, storm.num_swapped) >= 3
