"""Shadows: requests of a route put to further models, whose answers nobody gets.

A shadow runs only while no request of a client does, one at a time, and ends at once when one arrives; then it is tried
again. So clients wait for it at most as long as the step under way takes. (What a shadow loads may still push another
adapter out of RAM.) It sees no sampling seed of the client's but one that was sent.
"""

import asyncio
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace

import structlog

from loraplex.errors import LoraplexError
from loraplex.routing.route import Shadow
from loraplex.routing.router import Routed
from loraplex.serving.flight import Flight
from loraplex.serving.generation import Generation
from loraplex.serving.generation_request import GenerationRequest
from loraplex.serving.routes import Arm, Routes

logger = structlog.get_logger(__name__)

MAX_WAITING = 64
MAX_TRIES = 3
MAX_AGE = 120.0
"""Seconds after which a shadow that found no room is dropped."""
_MAX_LOGGED_CHARS = 2000


@dataclass(slots=True)
class _Job:
    alias: str
    shadow: Shadow
    request: GenerationRequest
    request_id: str  # of the request that was answered
    offered_at: float
    tries: int = 0


class Shadows:
    """`generate` makes a request run without counting it as a client's; `is_idle`: whether no client's runs. Used from
    the event loop."""

    def __init__(
        self,
        routes: Routes,
        generate: Callable[[GenerationRequest], Awaitable[Generation]],
        is_idle: Callable[[], bool],
        chance: Callable[[], float] = random.random,
    ):
        self._routes = routes
        self._generate = generate
        self._is_idle = is_idle
        self._chance = chance
        self._waiting: deque[_Job] = deque()
        self._working: asyncio.Future[None] | None = None
        self._consuming: asyncio.Future[None] | None = None
        self._must_yield = False
        self._is_closed = False

    async def close(self) -> None:
        """Run no more."""
        self._is_closed = True
        self._waiting.clear()
        self.give_way()
        if self._working is not None:
            await asyncio.gather(self._working, return_exceptions=True)

    def offer(self, request: GenerationRequest, routed: Routed, request_id: str) -> None:
        """Note the shadows of a request that is about to run."""
        for shadow in self._routes.shadows(routed.alias):
            if self._chance() >= shadow.share:
                continue
            arm = self._routes.shadow_arm(routed.alias, shadow.model)
            arm.window.count("drawn", time.monotonic())
            if len(self._waiting) >= MAX_WAITING or self._is_closed:
                arm.window.count("dropped", time.monotonic())
                continue
            asked = replace(request, model=shadow.model, n=1)
            self._waiting.append(_Job(routed.alias, shadow, asked, request_id, time.monotonic()))

    def give_way(self) -> None:
        """A client's request is there."""
        self._must_yield = True
        if self._consuming is not None:
            self._consuming.cancel()

    def wake(self) -> None:
        """There may be room."""
        is_working = self._working is not None and not self._working.done()
        if self._waiting and not is_working and not self._is_closed and self._is_idle():
            self._working = asyncio.ensure_future(self._work())
            self._working.add_done_callback(lambda _: self.wake())

    async def _work(self) -> None:
        while self._waiting and self._is_idle() and not self._is_closed:
            job = self._waiting.popleft()
            arm = self._routes.shadow_arm(job.alias, job.shadow.model)
            job.tries += 1
            if time.monotonic() - job.offered_at > MAX_AGE:
                arm.window.count("dropped", time.monotonic())
            elif not await self._ask(job, arm):
                if job.tries < MAX_TRIES:
                    self._waiting.appendleft(job)
                else:
                    arm.window.count("dropped", time.monotonic())

    async def _ask(self, job: _Job, arm: Arm) -> bool:
        """False: it had to give way."""
        self._must_yield = False
        try:
            generation = await self._generate(job.request)
        except LoraplexError as error:
            arm.window.count("unavailable", time.monotonic())
            self._log(job, failure=error.code)
            return True
        try:
            if self._must_yield:
                return False
            generation.engine = Flight(generation.engine, arm.window, lambda: None)
            self._consuming = asyncio.ensure_future(self._consume(job, generation))
            await asyncio.wait([self._consuming])
            return not self._consuming.cancelled()
        finally:
            self._consuming = None
            await generation.close()

    async def _consume(self, job: _Job, generation: Generation) -> None:
        texts: dict[int, str] = {}
        try:
            async with aclosing(generation.deltas()) as deltas:
                async for delta in deltas:
                    texts[delta.index] = texts.get(delta.index, "") + delta.text
        except LoraplexError as error:
            self._log(job, failure=error.code)
        else:
            self._log(job, answered=generation.model, texts=[texts[at][:_MAX_LOGGED_CHARS] for at in sorted(texts)])

    def _log(self, job: _Job, **found: object) -> None:
        if job.shadow.log:
            logger.info("shadow", route=job.alias, model=job.shadow.model, request_id=job.request_id, **found)
