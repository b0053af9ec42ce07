"""Background: threads for work that requests must not feel: uploads are written, hashed and checked there. And
`finished` and `entered`: how to wait for a thread that takes something."""

import asyncio
import os
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, suppress
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

NICENESS = 10
"""Of the threads beyond the process's, as the system's scheduler counts it. On two cores, one of them the engine's, a
check at the usual priority doubled the time of the engine's steps; at this one it adds a fifth."""


class Background:
    """`num_threads` of them. Closed by `close`. What runs here may hold no lock that a request waits for."""

    def __init__(self, num_threads: int):
        self._executor = ThreadPoolExecutor(num_threads, "background", initializer=_give_way)

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`function(...)` in one of the threads. Cancelling waits for nothing; what has begun goes on."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, lambda: function(*args, **kwargs))

    def close(self) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)


async def finished(work: Awaitable[T], give_up: Callable[[], object] = lambda: None) -> T:
    """What `work`, done by a thread, gives. When this is cancelled the thread goes on, so it is told to `give_up` and
    waited for: what it takes in its last moments is there for its owner to let go."""
    future = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        give_up()
        while not future.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([future])
        if not future.cancelled():
            future.exception()  # nobody else is there to see it
        raise


@asynccontextmanager
async def entered(manager: AbstractContextManager[T]) -> AsyncIterator[T]:
    """A `with` block of `manager`, begun and ended in a thread, and ended however this is cancelled."""
    stack = ExitStack()
    try:
        yield await finished(asyncio.to_thread(stack.enter_context, manager))
    finally:
        await finished(asyncio.to_thread(stack.close))


def _give_way() -> None:
    """Lower the calling thread's priority. Linux gives each thread one of its own; elsewhere it stays."""
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + NICENESS)
