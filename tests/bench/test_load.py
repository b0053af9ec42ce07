"""The load generator's accounting, against a server of known delays on a real socket."""

import asyncio
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from fake_server import FIRST, GAP, FakeServer

from loraplex.bench.arrivals import Arrivals, ClosedLoop, Poisson
from loraplex.bench.dialect import Dialect
from loraplex.bench.load import LoadResult, LoadTest, Workload
from loraplex.bench.popularity import Popularity
from loraplex.bench.prompts import Prompts
from loraplex.bench.server import BenchFailed, ServerUnderTest

SLACK = 0.04  # seconds that a busy machine may add


@pytest.fixture(scope="module")
def running() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


@pytest.fixture
def fake(running: FakeServer) -> FakeServer:
    running.forget()
    return running


def workload(*models: str, requests: int | None = 4, arrivals: Arrivals | None = None, **changes) -> Workload:
    sizes = {"popularity": Popularity("distinct"), "prompt_tokens": 5, "output_tokens": 4, **changes}
    return Workload(models=models, requests=requests, arrivals=arrivals or ClosedLoop(2), **sizes)


async def load(
    fake: FakeServer, work: Workload, *, is_chat: bool = False, stop: asyncio.Event | None = None, timeout: float = 30.0
) -> LoadResult:
    async with ServerUnderTest(fake.url, timeout=timeout) as server:
        prompts = Prompts(work.prompt_tokens, None if is_chat else list(range(100, 200)))
        return await LoadTest(server, work, prompts, Dialect(is_chat=is_chat)).run(stop=stop)


async def test_times_are_attributed_to_the_request_that_had_them(fake: FakeServer):
    result = await load(fake, workload("good", "slow", requests=6))
    assert len(result.good) == 6
    for outcome in result.good:
        factor = 3 if outcome.model == "slow" else 1
        assert outcome.first is not None
        assert outcome.last is not None
        assert outcome.ended is not None
        assert factor * FIRST <= outcome.first - outcome.due < factor * FIRST + SLACK
        assert len(outcome.gaps) == 3
        assert sum(outcome.gaps) == pytest.approx(outcome.last - outcome.first)
        assert 0.9 * factor * GAP <= np.median(outcome.gaps) < factor * GAP + SLACK
        assert outcome.due <= outcome.sent <= outcome.first < outcome.last <= outcome.ended
        assert (outcome.num_tokens, outcome.prompt_tokens, outcome.answered) == (4, 5, outcome.model)
        assert outcome.finish_reason == "length"
    assert result.seconds >= max(outcome.ended for outcome in result.good if outcome.ended) - result.started - 1e-6


async def test_the_workload_is_sent_as_it_says(fake: FakeServer):
    await load(fake, workload("good", "silent", requests=8, arrivals=ClosedLoop(4)))
    assert fake.most_open == 4
    assert Counter(seen.body["model"] for seen in fake.seen) == {"good": 4, "silent": 4}
    prompts = [tuple(seen.body["prompt"]) for seen in fake.seen]
    assert len(set(prompts)) == 8
    for seen in fake.seen:
        assert len(seen.body["prompt"]) == 5
        assert seen.body["max_tokens"] == 4
        assert seen.body["ignore_eos"] is True
        assert seen.body["temperature"] == 0
        assert seen.body["stream"] is True


async def test_poisson_arrivals_over_http(fake: FakeServer):
    arrivals = Poisson(200.0, seed=4)
    result = await load(fake, workload("good", requests=20, arrivals=arrivals))
    assert len(result.good) == 20
    assert fake.most_open > 10, "requests come while others run"
    dues = np.array([outcome.due for outcome in result.outcomes])
    arrived = np.array(sorted(seen.at for seen in fake.seen))
    assert (np.abs(arrived - dues) < SLACK).all()


async def test_duration_ends_the_sending(fake: FakeServer):
    result = await load(fake, workload("good", requests=None, seconds=0.3))
    assert 2 <= len(result.good) <= 6
    assert result.seconds >= 0.3, "the last ones are waited for"
    assert not result.is_interrupted


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("refused", "HTTP 429 overloaded: try again"),
        ("failing", "event step_failed: oh"),
        ("broken", "RemoteProtocolError"),
        ("whole", "no event stream"),
        ("aborted", "finish reason abort"),
        ("garbage", "an event that is not OpenAI's"),
    ],
)
async def test_what_goes_wrong_is_an_error_of_its_request_alone(fake: FakeServer, model: str, says: str):
    result = await load(fake, workload("good", model, requests=4))
    assert [outcome.model for outcome in result.failed] == [model, model]
    assert all(says in str(outcome.error) for outcome in result.failed)
    assert [outcome.model for outcome in result.good] == ["good", "good"]


async def test_a_server_that_hangs_is_a_timeout(fake: FakeServer):
    result = await load(fake, workload("slow", requests=1), timeout=0.1)
    assert [outcome.error for outcome in result.outcomes] == ["ReadTimeout"]


async def test_no_server_at_all():
    async with ServerUnderTest("http://127.0.0.1:9") as server:
        with pytest.raises(BenchFailed, match="No server answers"):
            await server.look()


async def test_without_usage_pieces_of_text_are_counted(fake: FakeServer):
    [outcome] = (await load(fake, workload("silent", requests=1))).good
    assert outcome.output_tokens is None
    assert outcome.num_tokens == 4


async def test_who_answered_is_looked_at(fake: FakeServer):
    renamed, good = (await load(fake, workload("renamed", "good", requests=2))).good
    assert renamed.is_another_model
    assert not good.is_another_model


async def test_chat(fake: FakeServer):
    [outcome] = (await load(fake, workload("good", requests=1), is_chat=True)).good
    assert outcome.events == 4, "the opening chunk has no text and is no token"
    assert outcome.first is not None
    assert outcome.first - outcome.due >= FIRST
    [seen] = fake.seen
    assert seen.body["messages"][0]["role"] == "user"


async def test_a_run_that_is_broken_off_keeps_what_it_has(fake: FakeServer):
    stop = asyncio.Event()
    asyncio.get_running_loop().call_later(FIRST + 4 * GAP + 0.1, stop.set)
    result = await load(fake, workload("good", requests=100, arrivals=ClosedLoop(3)), stop=stop)
    assert result.is_interrupted
    assert 3 <= len(result.good) <= 6
    assert len(result.unfinished) == 3
    assert not result.failed


def test_cold_requests_ask_for_models_that_were_not_asked_for():
    models = [f"m{index}" for index in range(40)]
    work = workload(*models, requests=40, cold_share=0.25, seed=5)
    choices = [choice for choice, _ in zip(work.choices(), range(40), strict=False)]
    cold = [model for model, is_cold in choices if is_cold]
    assert 4 <= len(cold) <= 18
    assert len(set(cold)) == len(cold)
    assert not set(cold) & {model for model, is_cold in choices if not is_cold}
    assert not set(cold) & set(work.warm_models)
    again = workload(*models, requests=40, cold_share=0.25, seed=5)
    assert choices == [choice for choice, _ in zip(again.choices(), range(40), strict=False)]


def test_cold_requests_end_with_the_models():
    work = workload(*(f"m{index}" for index in range(6)), requests=200, cold_share=0.5)
    choices = [choice for choice, _ in zip(work.choices(), range(200), strict=False)]
    assert sum(is_cold for _, is_cold in choices) == 3


async def learn(fake: FakeServer) -> LoadTest:
    async with ServerUnderTest(fake.url) as server:
        prompts = await Prompts.of(server, await server.look(), 30)
        test = LoadTest(server, workload("good", prompt_tokens=30), prompts)
        await test.warm_up(1)
        return test


async def test_what_the_server_refuses_is_left_out():
    with FakeServer(refuses=("ignore_eos",)) as fake:
        test = await learn(fake)
        assert not test._dialect.ignore_eos
        assert test._dialect.include_usage
    with FakeServer(refuses=("ignore_eos", "stream_options")) as fake:
        test = await learn(fake)
        assert not test._dialect.include_usage
    with FakeServer(refuses=("prompt",)) as fake:
        with pytest.raises(BenchFailed, match="unknown field prompt"):
            await learn(fake)


async def test_prompts_have_the_wanted_length():
    with FakeServer(has_tokenize=True) as fake:
        test = await learn(fake)
        assert test._prompts.is_exact
        prompt = test._prompts.next()
        assert len(prompt) == 30
        assert min(prompt) >= 10, "ids that the server named"
    with FakeServer() as fake:  # says that a word is two tokens, and one more for all
        test = await learn(fake)
        assert not test._prompts.is_exact
        prompt = test._prompts.next()
        assert isinstance(prompt, str)
        assert len(prompt.split()) == round(30 * 30 / 61)
