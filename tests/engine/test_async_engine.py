"""AsyncEngine with an engine that only counts: what crosses the border, and every way it can end."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

import pytest

from loraplex.engine.async_engine import AsyncEngine
from loraplex.engine.engine import EngineDied
from loraplex.engine.messages import (
    Command,
    CommandResult,
    EngineRequest,
    Failure,
    FinishReason,
    SequenceOutput,
    StepOutput,
)
from loraplex.engine.sampling_params import SamplingParams
from loraplex.errors import NotReady, StartupError


class CountingEngine:
    """Gives every sequence one token a step, `max_tokens` in all. Steps wait for `gate`."""

    def __init__(self, wake):
        self.wake = wake
        self.gate = threading.Event()
        self.gate.set()
        self.sequences: dict[str, list[int]] = {}
        self.aborted: list[str] = []
        self.last_error: str | None = None
        self.error: BaseException | None = None
        self.broken: str | None = None
        self.is_stalled = False
        self.num_steps = 0
        self.answers: tuple[CommandResult, ...] = ()
        self.was_closed = False
        self.thread = threading.current_thread()
        self.stepped = threading.Event()

    def add(self, request: EngineRequest) -> SequenceOutput | None:
        assert threading.current_thread() is self.thread
        if request.params.max_tokens == 13:
            failure = Failure("overloaded", "unlucky")
            return SequenceOutput(request.seq_id, finish_reason=FinishReason.ERROR, failure=failure)
        self.sequences[request.seq_id] = list(range(request.params.max_tokens))
        return None

    def abort(self, seq_id: str) -> None:
        self.aborted.append(seq_id)
        self.sequences.pop(seq_id, None)

    @property
    def has_work(self) -> bool:
        return bool(self.sequences)

    def step(self) -> StepOutput:
        self.stepped.set()
        self.gate.wait()
        self.num_steps += 1
        if self.error is not None:
            raise self.error
        if self.is_stalled:
            return StepOutput(self.num_steps, ())
        outputs = []
        for seq_id, left in list(self.sequences.items()):
            token = left.pop(0)
            if not left:
                del self.sequences[seq_id]
            outputs.append(SequenceOutput(seq_id, token, finish_reason=None if left else FinishReason.LENGTH))
        answers, self.answers = self.answers, ()
        return StepOutput(self.num_steps, tuple(outputs), answers)

    def take(self, command: Command) -> CommandResult | None:
        if command.name == "fail":
            return CommandResult(command.command_id, error="no such thing")
        if command.name == "later":
            self.sequences["later"] = [0]
            self.answers = (CommandResult(command.command_id, "at last"),)
            return None
        return CommandResult(command.command_id, (command.name, command.arguments))

    def check_integrity(self) -> None:
        if self.broken is not None:
            raise AssertionError(self.broken)

    def close(self) -> None:
        self.was_closed = True


@asynccontextmanager
async def running(on_death=lambda reason: None) -> AsyncIterator[tuple[AsyncEngine, CountingEngine]]:
    made: list[CountingEngine] = []

    def make(wake):
        made.append(CountingEngine(wake))
        return made[0], "info"

    engine = AsyncEngine(make, on_death)  # type: ignore[arg-type]
    assert await engine.start() == "info"
    try:
        yield engine, made[0]
    finally:
        made[0].gate.set()
        await engine.stop()
        assert made[0].was_closed
        assert not engine.is_alive


def request(seq_id: str, max_tokens: int = 3) -> EngineRequest:
    return EngineRequest(seq_id=seq_id, token_ids=(1,), params=SamplingParams(max_tokens=max_tokens))


async def collect(engine: AsyncEngine, *requests: EngineRequest) -> dict[str, list[int | None]]:
    tokens: dict[str, list[int | None]] = {r.seq_id: [] for r in requests}
    async for output in engine.submit(requests):
        tokens[output.seq_id].append(output.token_id)
    return tokens


async def test_every_stream_gets_its_own():
    async with running() as (engine, _):
        results = await asyncio.gather(
            *(collect(engine, request(f"{i}a", i), request(f"{i}b", 2)) for i in range(1, 9))
        )
    for i, tokens in enumerate(results, 1):
        assert tokens == {f"{i}a": list(range(i)), f"{i}b": [0, 1]}


async def test_a_refusal_is_an_output():
    async with running() as (engine, _):
        outputs = [output async for output in engine.submit((request("a", 13), request("b", 2)))]
        assert [o.failure.code for o in outputs if o.failure] == ["overloaded"]
        assert sum(o.seq_id == "b" for o in outputs) == 2


async def test_closing_a_stream_early_aborts_what_still_runs():
    async with running() as (engine, inner):
        async with aclosing(engine.submit((request("short", 1), request("long", 10_000)))) as outputs:
            async for output in outputs:
                if output.seq_id == "short":
                    break
        assert await engine.command("ping") == ("ping", {})  # behind the abort in the inbox
        assert inner.aborted == ["long"]
        assert not inner.has_work


async def test_a_cancelled_stream_is_aborted():
    async with running() as (engine, inner):
        inner.gate.clear()
        task = asyncio.create_task(collect(engine, request("a", 5)))
        await asyncio.to_thread(inner.stepped.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        inner.gate.set()
        await engine.command("ping")
        assert inner.aborted == ["a"]


async def test_commands_answer_and_fail():
    async with running() as (engine, _):
        assert await engine.command("look", at=3) == ("look", {"at": 3})
        with pytest.raises(ValueError, match="no such thing"):
            await engine.command("fail")
        assert await engine.command("later") == "at last"  # with a step's output
        asking = asyncio.ensure_future(engine.command("look"))
        await asyncio.sleep(0)
        asking.cancel()  # who asks and goes does no harm
        assert await engine.command("look") == ("look", {})


async def test_a_stalled_engine_sleeps_until_it_is_woken():
    async with running() as (engine, inner):
        inner.is_stalled = True
        task = asyncio.create_task(collect(engine, request("a", 2)))
        await asyncio.to_thread(inner.stepped.wait)
        await engine.command("ping")  # answered all the same
        steps = inner.num_steps
        await engine.command("ping")
        assert inner.num_steps <= steps + 1  # one step a message, not a busy loop
        inner.is_stalled = False
        inner.wake()
        assert await task == {"a": [0, 1]}


@pytest.mark.parametrize("error", [EngineDied("the end"), ZeroDivisionError("oops")])
async def test_death_reaches_everybody(error):
    deaths = []
    async with running(deaths.append) as (engine, inner):
        inner.gate.clear()
        streams = [asyncio.create_task(collect_outputs(engine, request(str(i)))) for i in range(3)]
        await asyncio.to_thread(inner.stepped.wait)
        asking = asyncio.create_task(engine.command("look"))
        await asyncio.sleep(0)
        inner.error = error
        inner.gate.set()
        for outputs in await asyncio.gather(*streams):
            assert outputs[-1].failure is not None
            assert outputs[-1].failure.code == "engine_stopped"
        with pytest.raises(NotReady):
            await asking
        assert len(deaths) == 1
        assert str(error) in deaths[0]
        assert engine.death == deaths[0]
        assert not engine.is_alive
        with pytest.raises(NotReady, match="not running"):
            await engine.command("look")
        with pytest.raises(NotReady, match="not running"):
            await collect(engine, request("late"))


async def collect_outputs(engine: AsyncEngine, *requests: EngineRequest) -> list[SequenceOutput]:
    return [output async for output in engine.submit(requests)]


async def test_broken_bookkeeping_when_idle_is_a_death():
    deaths = []
    async with running(deaths.append) as (engine, inner):
        inner.gate.clear()
        task = asyncio.create_task(collect_outputs(engine, request("a", 1)))
        await asyncio.to_thread(inner.stepped.wait)
        inner.broken = "a block leaked"
        inner.gate.set()
        await task
        await asyncio.to_thread(engine._thread.join)
        await asyncio.sleep(0)
        assert deaths == ["AssertionError: a block leaked"]


async def test_stopping_ends_what_runs():
    async with running() as (engine, inner):
        inner.gate.clear()
        task = asyncio.create_task(collect_outputs(engine, request("a", 100)))
        await asyncio.to_thread(inner.stepped.wait)
        stopping = asyncio.create_task(engine.stop())
        await asyncio.sleep(0)
        inner.gate.set()
        await stopping
        last = (await task)[-1]
        assert last.failure == Failure("engine_stopped", "The server is shutting down.")


async def test_what_building_raises_start_raises():
    def fail(wake):
        raise StartupError("no model")

    engine = AsyncEngine(fail)
    with pytest.raises(StartupError, match="no model"):
        await engine.start()
    await engine.stop()
