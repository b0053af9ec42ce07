"""LoadTest: sends requests to a server as the workload says and keeps the times of every token that comes back.

One asyncio loop; a request is one stream. Clock: time.perf_counter of this process.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx2
import numpy as np

from loraplex.bench.arrivals import Arrivals
from loraplex.bench.dialect import Dialect
from loraplex.bench.popularity import Popularity
from loraplex.bench.prompts import Prompts
from loraplex.bench.server import BenchFailed, ServerUnderTest, describe_refusal

DONE = "[DONE]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """models          names to ask for, the most popular first
    requests, seconds  when sending stops: after so many, after so long, whichever comes first; one must be set
    cold_share         share of requests that ask for an adapter that this run has not asked for before
    """

    models: tuple[str, ...]
    popularity: Popularity
    arrivals: Arrivals
    prompt_tokens: int = 64
    output_tokens: int = 32
    requests: int | None = None
    seconds: float | None = None
    cold_share: float = 0.0
    seed: int = 0

    @property
    def num_cold(self) -> int:
        """How many models, the last of the list, are kept for cold requests. Half of them at most."""
        if not self.cold_share:
            return 0
        wanted = len(self.models) if self.requests is None else round(1.5 * self.cold_share * self.requests) + 4
        return min(wanted, len(self.models) // 2)

    @property
    def warm_models(self) -> tuple[str, ...]:
        return self.models[: len(self.models) - self.num_cold]

    def choices(self) -> Iterator[tuple[str, bool]]:
        """Model and whether it is cold, request by request; the same for the same seed."""
        warm = self.warm_models
        cold = iter(self.models[len(warm) :])
        generator = np.random.default_rng([self.seed, 2])
        for index in self.popularity.draws(len(warm), self.seed):
            model = next(cold, None) if self.cold_share and generator.random() < self.cold_share else None
            yield (warm[index], False) if model is None else (model, True)


@dataclass(slots=True)
class Outcome:
    """One request. Times in seconds of the clock; `gaps` in seconds, between the pieces of text that came.

    error     None: it ended well
    answered  the `model` of the reply
    events    pieces of text
    """

    model: str
    is_cold: bool
    due: float
    sent: float = 0.0
    first: float | None = None
    last: float | None = None
    ended: float | None = None
    gaps: list[float] = field(default_factory=list)
    events: int = 0
    prompt_tokens: int | None = None
    cached_tokens: int = 0
    output_tokens: int | None = None
    finish_reason: str | None = None
    answered: str | None = None
    error: str | None = None

    @property
    def is_good(self) -> bool:
        return self.ended is not None and self.error is None

    @property
    def num_tokens(self) -> int:
        """Tokens that came: as the server counts them, else the pieces of text."""
        return self.events if self.output_tokens is None else self.output_tokens

    @property
    def is_another_model(self) -> bool:
        return self.answered is not None and self.answered.partition("@")[0] != self.model.partition("@")[0]

    def see_text(self, now: float) -> None:
        if self.last is None:
            self.first = now
        else:
            self.gaps.append(now - self.last)
        self.last = now
        self.events += 1


@dataclass(slots=True)
class LoadResult:
    """`seconds`: from the first request that was due to the last that ended. `cpu_seconds`: of this process."""

    workload: Workload
    dialect: Dialect
    outcomes: list[Outcome]
    started: float
    seconds: float
    cpu_seconds: float
    is_interrupted: bool

    @property
    def good(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.is_good]

    @property
    def failed(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.error is not None]

    @property
    def unfinished(self) -> list[Outcome]:
        """Those that were under way when the run was broken off."""
        return [outcome for outcome in self.outcomes if outcome.error is None and outcome.ended is None]


class LoadTest:
    def __init__(self, server: ServerUnderTest, workload: Workload, prompts: Prompts, dialect: Dialect | None = None):
        self._server = server
        self._workload = workload
        self._prompts = prompts
        self._dialect = dialect or Dialect()

    async def warm_up(self, count: int) -> None:
        """Learn what the server takes, then ask the `count` most popular models for one token each.

        Raises BenchFailed with the server's words when it refuses.
        """
        model = self._workload.warm_models[0]
        refusals = []
        for dialect in self._dialect.lesser():
            self._dialect = dialect
            outcome = await self._ask(model, 2)
            if outcome.error is None:
                break
            refusals.append(outcome.error)
        else:
            raise BenchFailed(f"{self._server.url} does not answer a request for {model!r}: {refusals[0]}")
        if outcome.prompt_tokens:
            self._prompts.calibrate(outcome.prompt_tokens)
        for model in self._workload.warm_models[1:count]:
            outcome = await self._ask(model, 1)
            if outcome.error is not None:
                raise BenchFailed(f"The warm-up request for {model!r} failed: {outcome.error}")

    async def run(
        self, on_done: Callable[[Outcome], object] = lambda _: None, stop: asyncio.Event | None = None
    ) -> LoadResult:
        """Send everything. When `stop` is set, what is under way is cancelled and what there is is returned."""
        workload, outcomes = self._workload, []
        choices = workload.choices()
        started, cpu = time.perf_counter(), time.process_time()
        deadline = None if workload.seconds is None else started + workload.seconds
        issued = 0

        def more() -> bool:
            nonlocal issued
            is_over = workload.requests is not None and issued >= workload.requests
            if is_over or (deadline is not None and time.perf_counter() >= deadline):
                return False
            issued += 1
            return True

        async def send(due: float) -> None:
            model, is_cold = next(choices)
            outcome = Outcome(model, is_cold, due)
            outcomes.append(outcome)
            await self._send(outcome, self._prompts.next(), workload.output_tokens)
            on_done(outcome)

        load = asyncio.ensure_future(workload.arrivals.run(send, more))
        stopping = asyncio.ensure_future((stop or asyncio.Event()).wait())
        try:
            await asyncio.wait({load, stopping}, return_when=asyncio.FIRST_COMPLETED)
            is_interrupted = not load.done()
        finally:
            load.cancel()
            stopping.cancel()
            ends = await asyncio.gather(load, stopping, return_exceptions=True)
        if isinstance(ends[0], Exception):
            raise ends[0]
        ended = max((outcome.ended for outcome in outcomes if outcome.ended), default=time.perf_counter())
        if is_interrupted:
            ended = time.perf_counter()
        cpu_seconds = time.process_time() - cpu
        return LoadResult(workload, self._dialect, outcomes, started, ended - started, cpu_seconds, is_interrupted)

    async def _ask(self, model: str, tokens: int) -> Outcome:
        outcome = Outcome(model, False, time.perf_counter())
        await self._send(outcome, self._prompts.next(), tokens)
        return outcome

    async def _send(self, outcome: Outcome, prompt: str | list[int], max_tokens: int) -> None:
        """One request from its sending to its end; whatever goes wrong becomes the outcome's error."""
        body = self._dialect.body(outcome.model, prompt, max_tokens)
        outcome.sent = time.perf_counter()
        try:
            outcome.error = await self._stream(outcome, body)
        except httpx2.TimeoutException as error:
            outcome.error = type(error).__name__
        except httpx2.SSEError:
            outcome.error = "no event stream"
        except httpx2.HTTPError as error:
            outcome.error = f"{type(error).__name__}: {error}"[:200]
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            outcome.error = f"an event that is not OpenAI's ({type(error).__name__})"
        outcome.ended = time.perf_counter()

    async def _stream(self, outcome: Outcome, body: dict[str, Any]) -> str | None:
        """Read the reply; returns what was wrong with it."""
        async with self._server.http.stream("POST", self._dialect.path, json=body) as reply:
            if not reply.is_success:
                return describe_refusal(reply.status_code, await reply.aread())
            is_whole = False
            async for sent in httpx2.EventSource(reply):
                now = time.perf_counter()
                if sent.data == DONE:
                    is_whole = True
                    continue  # to the end of the body, so that the connection can be used again
                event: Any = sent.json()
                if event.get("error"):
                    return f"event {event['error'].get('code')}: {event['error'].get('message')}"[:200]
                outcome.answered = event.get("model") or outcome.answered
                for choice in event.get("choices") or ():
                    text = choice["delta"].get("content") if self._dialect.is_chat else choice.get("text")
                    if text:
                        outcome.see_text(now)
                    outcome.finish_reason = choice.get("finish_reason") or outcome.finish_reason
                if event.get("usage"):
                    self._take_usage(outcome, event["usage"])
        if not is_whole and outcome.finish_reason is None:
            return "the stream broke off"
        if outcome.finish_reason in ("error", "abort"):
            return f"finish reason {outcome.finish_reason}"
        return None

    @staticmethod
    def _take_usage(outcome: Outcome, usage: dict[str, Any]) -> None:
        outcome.prompt_tokens = usage.get("prompt_tokens")
        outcome.output_tokens = usage.get("completion_tokens")
        details = usage.get("prompt_tokens_details") or {}
        outcome.cached_tokens = details.get("cached_tokens") or 0
