"""Evaluations: the evaluation sets of routes, and their runs on targets beside the traffic.

A run asks every target every case, the targets side by side, greedily, as a request would: with each one's own
template, profile and stop strings. It has low priority: while a client's request runs it has one of its own, else up to
`WIDTH`.

A run lives in one process and is told to the registry, so every process can show it, and cancel it. When its process
ends, so does the run, as interrupted; sets, results and reports stay.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace

import structlog

from loraplex.engine.sampling_params import SamplingParams
from loraplex.errors import InvalidRequest, LoraplexError, ModelNotFound, NotReady, Overloaded
from loraplex.evaluation.evaluation_set import Case, read_set
from loraplex.evaluation.report import Tally
from loraplex.lora.evaluation_book import CANCELLED, INTERRUPTED, EvaluationBook, Result, StoredRun, StoredSet
from loraplex.lora.event import SERVER
from loraplex.routing.route import Gate
from loraplex.serving.gating import Gating
from loraplex.serving.generation import Generation
from loraplex.serving.generation_request import GenerationRequest
from loraplex.serving.resolution import Names
from loraplex.serving.routes import Live, Routes

logger = structlog.get_logger(__name__)

WIDTH = 8
MAX_TARGETS = 16
USUAL_MAX_TOKENS = 256
"""Of an answer whose case and whose target's profile say nothing of it."""
_BEAT = 1.0
"""Seconds between two signs of life in the registry."""
_SILENT = frozenset(("top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "stop"))


@dataclass(frozen=True, slots=True)
class Standing:
    """How the targets of a route stand. `results`: of each target in the set as it is now."""

    stored: StoredSet
    live: Live
    results: Mapping[str, Result | None]
    run: StoredRun | None


@dataclass(slots=True)
class _Work:
    run: StoredRun
    done: int = 0
    task: asyncio.Future[None] | None = None


class _Cancelled(Exception):
    """It was cancelled before its results were written."""


class Evaluations:
    """`generate` makes a request run without counting it as a client's; `is_idle`: whether no client's runs. Used from
    the event loop."""

    def __init__(
        self,
        book: EvaluationBook,
        routes: Routes,
        names: Names,
        gating: Gating,
        generate: Callable[[GenerationRequest], Awaitable[Generation]],
        is_idle: Callable[[], bool],
    ):
        self._book = book
        self._routes = routes
        self._names = names
        self._gating = gating
        self._generate = generate
        self._is_idle = is_idle
        self._works: dict[str, _Work] = {}  # by run
        self._is_closed = False
        self.num_passed = 0
        self.num_failed = 0

    async def close(self) -> None:
        """End all runs, as interrupted."""
        self._is_closed = True
        for work in list(self._works.values()):
            if work.task is not None:
                work.task.cancel()
                await asyncio.gather(work.task, return_exceptions=True)

    # -- sets -------------------------------------------------------------------------------------------------

    async def put(self, alias: str, data: bytes, *, who: str, expected: int | None = None) -> StoredSet:
        """Store a set for the route, durably. What targets have passed counts no longer, unless it is the same set.
        Raises InvalidRequest that names the line, ModelNotFound for no route, RouteChanged."""
        cases = await asyncio.to_thread(read_set, data)
        return await asyncio.to_thread(self._put, alias, data, len(cases), who, expected)

    def _put(self, alias: str, data: bytes, num_cases: int, who: str, expected: int | None) -> StoredSet:
        self._routes.get(alias)
        before = self._book.find(alias)
        is_same = before is not None and before.content == data

        def within(connection, was, now) -> None:
            self._book.write(connection, alias, data, num_cases, who, expected)

        reason = {"evaluation": "the set was changed"}
        self._routes.settle(alias, within, has_passed=lambda gate, model: is_same, who=who, reason=reason)
        return self._book.get(alias)

    async def delete(self, alias: str, *, who: str, expected: int | None = None) -> None:
        """Forget the set. Raises ModelNotFound, RouteChanged."""

        def within(connection, was, now) -> None:
            self._book.write(connection, alias, None, 0, who, expected)

        await asyncio.to_thread(self._book.get, alias)
        reason = {"evaluation": "the set was deleted"}
        settle = self._routes.settle
        await asyncio.to_thread(settle, alias, within, has_passed=lambda gate, model: False, who=who, reason=reason)

    async def get(self, alias: str) -> StoredSet:
        """Raises ModelNotFound."""
        return await asyncio.to_thread(self._book.get, alias)

    async def standing(self, alias: str) -> Standing:
        """Raises ModelNotFound."""
        return await asyncio.to_thread(self._standing, alias)

    def _standing(self, alias: str) -> Standing:
        live, stored = self._routes.get(alias), self._book.get(alias)
        runs = self._book.runs(alias)
        results = self._gating.results(alias, [target.model for target in live.route.targets])
        return Standing(stored, live, results, self._at_present(runs[0]) if runs else None)

    # -- runs -------------------------------------------------------------------------------------------------

    async def start(self, alias: str, targets: Sequence[str] | None, *, who: str) -> StoredRun:
        """Begin a run on `targets`, by default on all of the route. Raises ModelNotFound, InvalidRequest, RouteRefused
        while another one goes on."""
        if self._is_closed:
            raise NotReady("The server is shutting down and takes no new runs.", code="draining")
        run, cases, tallies = await asyncio.to_thread(self._begin, alias, targets, who)
        work = self._works[run.run_id] = _Work(run)
        work.task = asyncio.ensure_future(self._work(work, cases, tallies))
        return run

    def _begin(
        self, alias: str, targets: Sequence[str] | None, who: str
    ) -> tuple[StoredRun, Sequence[Case], Sequence[Tally]]:
        live, stored = self._routes.get(alias), self._book.get(alias)
        asked = [target.model for target in live.route.targets] if targets is None else targets
        resolved = {found.model: found for found in map(self._names.resolve, asked)}
        if not 1 <= len(resolved) <= MAX_TARGETS:
            raise InvalidRequest(
                f"A run has 1 to {MAX_TARGETS} targets, not {len(resolved)}. Name some of them.", param="targets"
            )
        cases = read_set(stored.content)
        tallies = [Tally(model, self._gating.identity_of(found)) for model, found in resolved.items()]
        run = self._book.begin(stored, list(resolved), len(cases) * len(tallies), who)
        return run, cases, tallies

    async def runs(self, alias: str) -> Sequence[StoredRun]:
        """The latest first, without reports."""
        found = await asyncio.to_thread(self._book.runs, alias)
        return [self._at_present(run) for run in found]

    async def run(self, alias: str, run_id: str | None = None) -> StoredRun:
        """A run, by default the latest. Raises ModelNotFound."""
        return self._at_present(await asyncio.to_thread(self._book.run, alias, run_id))

    async def cancel(self, alias: str, run_id: str) -> StoredRun:
        """End a run, wherever it runs; one that has ended stays what it is. Raises ModelNotFound."""
        await asyncio.to_thread(self._book.run, alias, run_id)
        await asyncio.to_thread(self._book.end, run_id, CANCELLED)
        work = self._works.get(run_id)
        if work is not None and work.task is not None:
            work.task.cancel()
            await asyncio.gather(work.task, return_exceptions=True)
        return await self.run(alias, run_id)

    def _at_present(self, run: StoredRun) -> StoredRun:
        work = self._works.get(run.run_id)
        return run if work is None else replace(run, done=max(run.done, work.done))

    # -- a run's own task -------------------------------------------------------------------------------------

    async def _work(self, work: _Work, cases: Sequence[Case], tallies: Sequence[Tally]) -> None:
        run_id = work.run.run_id
        is_finished = False
        try:
            if await self._ask_all(work, cases, tallies):
                await asyncio.to_thread(self._finish, work.run, tallies)
            is_finished = True
        except _Cancelled:
            is_finished = True
        except LoraplexError as error:  # the server stops, or the registry refuses
            logger.warning("an evaluation was interrupted", run=run_id, reason=error.message)
        except Exception:
            logger.exception("an evaluation failed", run=run_id)
        finally:
            self._works.pop(run_id, None)
            if not is_finished:
                with suppress(LoraplexError):
                    await asyncio.to_thread(self._book.end, run_id, INTERRUPTED)

    async def _ask_all(self, work: _Work, cases: Sequence[Case], tallies: Sequence[Tally]) -> bool:
        """False: the run was cancelled from elsewhere."""
        waiting = deque((tally, case) for case in cases for tally in tallies)
        running: set[asyncio.Future[None]] = set()
        judging = asyncio.Lock()  # a check is not for several threads
        told = time.monotonic()
        try:
            while waiting or running:
                while waiting and len(running) < (WIDTH if self._is_idle() else 1):
                    tally, case = waiting.popleft()
                    running.add(asyncio.ensure_future(self._ask(work.run, tally, case, judging)))
                ended, running = await asyncio.wait(running, timeout=_BEAT, return_when=asyncio.FIRST_COMPLETED)
                for one in ended:
                    one.result()
                work.done += len(ended)
                if time.monotonic() - told >= _BEAT:
                    told = time.monotonic()
                    if not await asyncio.to_thread(self._book.progress, work.run.run_id, work.done):
                        return False
        finally:
            for one in running:
                one.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        return True

    async def _ask(self, run: StoredRun, tally: Tally, case: Case, judging: asyncio.Lock) -> None:
        """Raises NotReady when the server stops."""
        request = GenerationRequest(
            model=tally.model,
            prompts=None if case.prompt is None else [case.prompt],
            messages=None if case.messages is None else [dict(one) for one in case.messages],
            max_tokens=case.max_tokens,
            usual_max_tokens=USUAL_MAX_TOKENS,
            params=SamplingParams(temperature=0.0),
            silent=_SILENT,
            seed=0,
            salt=f"evaluation {run.run_id}".encode(),
        )
        try:
            answer = await self._answer(request)
        except NotReady:
            raise
        except LoraplexError as error:
            self._count(tally, case, None, error.message)
            return
        async with judging:
            problem = await asyncio.to_thread(case.check.problem, answer)
        self._count(tally, case, answer, problem)

    def _count(self, tally: Tally, case: Case, answer: str | None, problem: str | None) -> None:
        tally.add(case, answer, problem)
        self.num_passed += problem is None
        self.num_failed += problem is not None

    async def _answer(self, request: GenerationRequest) -> str:
        while True:
            try:
                generation = await self._generate(request)
                try:
                    async with aclosing(generation.deltas()) as deltas:
                        return "".join([delta.text async for delta in deltas])
                finally:
                    await generation.close()
            except Overloaded as error:  # clients first
                await asyncio.sleep(error.retry_after)

    def _finish(self, run: StoredRun, tallies: Sequence[Tally]) -> None:
        """Write results and report; a ramp to a target that has not passed now ends where it stands."""
        results = {
            tally.identity: Result(tally.identity, tally.model, run.set_revision, tally.passed, tally.total)
            for tally in tallies
        }
        report = {"targets": [tally.to_json() for tally in tallies]}

        def within(connection, was, now) -> None:
            if not self._book.finish(connection, run, list(results.values()), report):
                raise _Cancelled

        try:
            live = self._routes.get(run.alias)
            stored = self._book.find(run.alias)
            counts = stored is not None and stored.revision == run.set_revision
            identities = {target.model: self._gating.identity(target.model) for target in live.route.targets}

            def has_passed(gate: Gate, model: str) -> bool:
                result = results.get(identities.get(model) or "")
                return not counts or result is None or result.rate >= gate.min_pass

            reason = {"evaluation": "the target did not pass", "run": run.run_id}
            self._routes.settle(run.alias, within, has_passed=has_passed, who=SERVER, reason=reason)
        except ModelNotFound:  # the route is gone
            self._book.finish_alone(run, list(results.values()), report)
