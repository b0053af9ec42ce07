"""ServeBench: from the options of `loraplex bench serve` to a report: look, prepare, warm up, send, count."""

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loraplex.bench.arrivals import Arrivals, ClosedLoop
from loraplex.bench.dialect import Dialect
from loraplex.bench.load import LoadResult, LoadTest, Outcome, Workload
from loraplex.bench.machine import MachineLimits, measure_limits
from loraplex.bench.popularity import Popularity
from loraplex.bench.preparation import BaseShape, Preparation
from loraplex.bench.prompts import Prompts
from loraplex.bench.report import ServingRoofline, serve_report
from loraplex.bench.server import BenchFailed, ServerFacts, ServerUnderTest
from loraplex.errors import LoraplexError
from loraplex.model.devices import DTYPES

PATTERN = "bench-{:04d}"
_MAX_WARM_UP = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """models     names to ask for; empty: `adapters` of them by `pattern`
    adapters   None: the server's own adapters, or its base when it has none; 0: the base
    prepare    push random adapters of `rank` until the first `prepare` names of `pattern` are served
    base       the folder of the server's base, None: where the server says it is, if that is here
    requests, seconds   when sending stops
    warm_up    models that are asked once before the clock starts, the most popular first; None: all, at most 64
    threads    compute threads of a server that does not tell, for its limits
    limits     measured before; None: measured now
    """

    url: str
    api_key: str | None = None
    models: tuple[str, ...] = ()
    adapters: int | None = None
    pattern: str = PATTERN
    prepare: int = 0
    rank: int = 16
    base: Path | None = None
    popularity: Popularity = Popularity("uniform")
    arrivals: Arrivals = ClosedLoop(32)
    requests: int | None = None
    seconds: float | None = None
    prompt_tokens: int = 64
    output_tokens: int = 32
    cold_share: float = 0.0
    is_chat: bool = False
    seed: int = 0
    warm_up: int | None = None
    timeout: float = 600.0
    threads: int | None = None
    limits: MachineLimits | None = None


@dataclass(frozen=True, slots=True)
class ServeRun:
    report: dict[str, Any]
    result: LoadResult

    @property
    def is_good(self) -> bool:
        """Whether every request was answered, and by the model that was asked (other servers may name it otherwise)."""
        requests, server = self.report["requests"], self.report["server"]
        is_answered = not requests["failed"] and requests["good"] > 0
        return is_answered and not (server["is_loraplex"] and requests["answered_by_another_model"])


class Watcher:
    """What is told of a run's progress; this one does not listen."""

    def phase(self, name: str, total: int | None) -> None:
        """A phase of `total` steps begins (None: unknown)."""

    def step(self) -> None:
        """One step of the phase is done."""

    def done(self, outcome: Outcome) -> None:
        """A request of the measurement has ended."""


class ServeBench:
    def __init__(self, settings: ServeSettings, watcher: Watcher | None = None):
        self._settings = settings
        self._watcher = watcher or Watcher()

    async def run(self, on_start: Callable[[Callable[[], None]], None] = lambda stop: None) -> ServeRun:
        """Raises BenchFailed when the measurement cannot begin; what fails later is counted in the report. `on_start`
        is called when it begins, with what ends it early (on this event loop)."""
        settings = self._settings
        async with ServerUnderTest(settings.url, settings.api_key, settings.timeout) as server:
            facts = await server.look()
            await self._prepare(server, facts)
            if settings.prepare:
                facts = await server.look()
            workload = self._workload(facts)
            roofline, why_not = await self._roofline(server, facts, workload)
            prompts = await Prompts.of(server, facts, settings.prompt_tokens, is_chat=settings.is_chat)
            load = LoadTest(server, workload, prompts, Dialect(is_chat=settings.is_chat))
            self._watcher.phase("warm up", None)
            count = _MAX_WARM_UP if settings.warm_up is None else settings.warm_up
            await load.warm_up(min(count, len(workload.warm_models)))
            before = await server.counters()
            self._watcher.phase("requests", workload.requests)
            stop = asyncio.Event()
            on_start(stop.set)
            result = await load.run(self._done, stop)
            after = await server.counters()
        return ServeRun(serve_report(result, facts, server.url, before, after, roofline, why_not), result)

    def _done(self, outcome: Outcome) -> None:
        self._watcher.step()
        self._watcher.done(outcome)

    async def _prepare(self, server: ServerUnderTest, facts: ServerFacts) -> None:
        settings = self._settings
        if not settings.prepare:
            return
        base = _shape(settings.base or facts.root)
        if base is None:
            raise BenchFailed("--prepare needs the base's folder on this machine: give --base FOLDER.")
        preparation = Preparation(server, facts, base, settings.rank)
        self._watcher.phase("push adapters", settings.prepare)
        await preparation.push(self._names(settings.prepare), self._watcher.step)

    def _workload(self, facts: ServerFacts) -> Workload:
        settings = self._settings
        count = settings.adapters
        if count is None and settings.prepare:
            count = settings.prepare
        if settings.models:
            models = settings.models
        elif count is None:
            models = tuple(facts.adapters) or (facts.base,)
        else:
            models = self._names(count) or (facts.base,)
        if not settings.models:
            missing = [name for name in models if name not in set(facts.models)]
            if missing:
                raise BenchFailed(
                    f"{len(missing)} of {len(models)} adapters are not served, {missing[0]!r} among them. Give "
                    f"--prepare {count} to push random ones, --pattern, or --model."
                )
        return Workload(
            models=models,
            popularity=settings.popularity,
            arrivals=settings.arrivals,
            prompt_tokens=settings.prompt_tokens,
            output_tokens=settings.output_tokens,
            requests=settings.requests,
            seconds=settings.seconds,
            cold_share=settings.cold_share,
            seed=settings.seed,
        )

    def _names(self, count: int) -> tuple[str, ...]:
        try:
            names = tuple(self._settings.pattern.format(index) for index in range(count))
        except (ValueError, IndexError, KeyError) as error:
            raise BenchFailed(f"--pattern {self._settings.pattern!r} is not as {PATTERN!r} ({error}).") from None
        if len(set(names)) < count:
            raise BenchFailed(f"--pattern {self._settings.pattern!r} gives the same name twice; it needs a {{}}.")
        return names

    async def _roofline(
        self, server: ServerUnderTest, facts: ServerFacts, workload: Workload
    ) -> tuple[ServingRoofline | None, str]:
        """None, and why, when the server's limits cannot be known from here."""
        settings = self._settings
        if not server.is_local:
            return None, "the server is on another machine"
        try:
            base = _shape(settings.base or facts.root)
            if base is None:
                return None, "the base's folder is not known; --base FOLDER names it"
            name = facts.version.get("dtype")
            dtype = DTYPES[name] if name else base.dtype
            cost = base.cost(dtype)
        except LoraplexError as error:
            return None, error.message
        device = torch.device(facts.version.get("device", "cpu"))
        if device.type == "cuda" and not torch.cuda.is_available():
            return None, "the server's GPU cannot be measured from this process"
        threads = facts.version.get("threads") or settings.threads or os.cpu_count() or 1
        limits = settings.limits
        if limits is None or limits.threads != threads:
            self._watcher.phase("limits of the machine", None)
            limits = await asyncio.to_thread(measure_limits, device, threads, (dtype,))
        numel = 0.0
        if facts.is_loraplex and set(workload.models) != {facts.base}:
            rows = await server.adapters()
            sizes = [rows[name].num_values if name in rows else 0.0 for name in workload.warm_models]
            numel = float(workload.popularity.pmf(len(sizes)) @ sizes)
        return ServingRoofline(limits, cost, numel, str(dtype).removeprefix("torch.")), ""


def _shape(folder: Path | None) -> BaseShape | None:
    return None if folder is None else BaseShape.read(folder)
