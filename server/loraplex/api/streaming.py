"""Server-sent events, and noticing that a client is gone: a closed connection ends the work at once."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"


class ClientGone(Exception):
    """The client closed the connection before its answer was ready."""


def event(data: Any) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class EventStream(StreamingResponse):
    """A stream of events that is cancelled when the client goes away, also while nothing is being sent.

    `close` is awaited at the end in any case: a generator that was never started has no `finally` that runs.
    """

    def __init__(self, content: AsyncGenerator[bytes], headers: dict[str, str], close: Callable[[], Awaitable[None]]):
        super().__init__(content, headers={**headers, "cache-control": "no-store"}, media_type="text/event-stream")
        self._content = content
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        stream = asyncio.ensure_future(self.stream_response(send))
        watch = asyncio.ensure_future(_disconnect(receive))
        try:
            await asyncio.wait({stream, watch}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            watch.cancel()
            if not stream.done():
                stream.cancel()
            await asyncio.gather(stream, watch, return_exceptions=True)
            await self._content.aclose()
            await self._close()
        error = None if stream.cancelled() else stream.exception()
        if error is not None and not isinstance(error, OSError):  # OSError: the connection broke while sending
            raise error


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Await `work`; cancel it and raise ClientGone when the client closes the connection first."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnect(request.receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        watch.cancel()
        task.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
