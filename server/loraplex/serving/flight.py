"""Flight: one request on a target of a route, watched from the decision to its last token."""

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from loraplex.engine.async_engine import EngineClient
from loraplex.engine.messages import EngineRequest, SequenceOutput
from loraplex.routing.observed import Window
from loraplex.serving.generation import NON_FINITE

Clock = Callable[[], float]

_CLIENTS = ("invalid_request", "duplicate_request", "context_length_exceeded", "overloaded", "engine_stopped")
"""Failures that say nothing of the target."""


class Flight:
    """An EngineClient that notes in `window` what passes through it. Used from the event loop; `on_end` is called once,
    when a request that reached the engine has ended."""

    def __init__(self, engine: EngineClient, window: Window, on_end: Callable[[], None], clock: Clock = time.monotonic):
        self._engine = engine
        self._window = window
        self._on_end = on_end
        self._clock = clock
        self._started = clock()
        self._open: set[str] = set()  # sequences that have not ended

    async def submit(self, requests: tuple[EngineRequest, ...]) -> AsyncGenerator[SequenceOutput]:
        self._open = {request.seq_id for request in requests}
        last: dict[str, float] = {}
        has_failed = False
        try:
            async with aclosing(self._engine.submit(requests)) as outputs:
                async for output in outputs:
                    if output.token_id is not None:
                        self._note_token(output.seq_id, last)
                    if output.finish_reason is not None and output.failure is None:
                        self._open.discard(output.seq_id)
                    if output.failure is not None and output.failure.code not in _CLIENTS:
                        has_failed = True
                        if output.failure.code == NON_FINITE:
                            self._window.count("non_finite", self._clock())
                    yield output
        finally:
            outcome = "failed" if has_failed else "aborted" if self._open else "answered"
            self._window.count(outcome, self._clock())
            self._on_end()

    def _note_token(self, seq_id: str, last: dict[str, float]) -> None:
        now = self._clock()
        if seq_id in last:
            self._window.time("between", now - last[seq_id], now)
        elif not last:
            self._window.time("ttft", now - self._started, now)
        last[seq_id] = now

    def abort(self, seq_ids: tuple[str, ...]) -> None:
        self._open -= set(seq_ids)  # the output side has all that it wants of them
        self._engine.abort(seq_ids)

    async def command(self, name: str, **arguments: Any) -> Any:
        return await self._engine.command(name, **arguments)

    @property
    def is_alive(self) -> bool:
        return self._engine.is_alive
