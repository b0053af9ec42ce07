"""AsyncEngine: the engine on a thread of its own, spoken to by values through one inbox and one outbox.

The inbox takes EngineRequest, Abort and Command and is drained between steps. The outbox carries one StepOutput a step,
handed to the event loop by `call_soon_threadsafe`. Nothing else crosses: so the thread can become a process by changing
this file alone. This is the one file of `engine/` that knows threads and asyncio.
"""

import asyncio
import itertools
import threading
from collections.abc import AsyncGenerator, Callable
from queue import Empty, SimpleQueue
from typing import Any, Protocol

import structlog

from loraplex.engine.build import EngineInfo
from loraplex.engine.engine import Engine, EngineDied
from loraplex.engine.messages import (
    Abort,
    Command,
    CommandResult,
    EngineRequest,
    Failure,
    FinishReason,
    SequenceOutput,
    StepOutput,
)
from loraplex.errors import NotReady

logger = structlog.get_logger(__name__)

_PATIENCE = 0.5
"""Seconds after which a stalled engine looks at the time."""


class EngineClient(Protocol):
    """What the service needs of an engine, wherever it runs. All values are picklable."""

    def submit(self, requests: tuple[EngineRequest, ...]) -> AsyncGenerator[SequenceOutput]:
        """Start sequences; iterate over their outputs, of which each one's last has a finish reason. Ending the
        iteration early aborts what still runs."""
        ...

    def abort(self, seq_ids: tuple[str, ...]) -> None: ...

    async def command(self, name: str, **arguments: Any) -> Any: ...

    @property
    def is_alive(self) -> bool: ...


class AsyncEngine:
    """`make_engine(wake)` builds the engine and tells about it, on the engine's own thread (kernels that are bound to
    one thread compile and run there only); `wake` may be called from any thread to have the inbox looked at."""

    def __init__(
        self,
        make_engine: Callable[[Callable[[], None]], tuple[Engine, EngineInfo]],
        on_death: Callable[[str], None] = lambda reason: None,
    ):
        self._make_engine = make_engine
        self._on_death = on_death
        self._inbox: SimpleQueue[EngineRequest | Abort | Command | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._streams: dict[str, asyncio.Queue[SequenceOutput]] = {}
        self._commands: dict[int, asyncio.Future[Any]] = {}
        self._command_ids = itertools.count()
        self._stopping = threading.Event()
        self._death: str | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started: asyncio.Future[EngineInfo] | None = None

    # -- life (event loop) ------------------------------------------------------------------------------------

    async def start(self) -> EngineInfo:
        """Build the engine and wait until it can serve. Raises what building it raised."""
        self._loop = asyncio.get_running_loop()
        self._started = self._loop.create_future()
        self._thread.start()
        return await self._started

    async def stop(self) -> None:
        """End the thread after the step under way; sequences that still run end with an error."""
        self._stopping.set()
        self._wake()
        await asyncio.to_thread(self._thread.join)
        self._fail_all("The server is shutting down.")

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and self._death is None

    @property
    def death(self) -> str | None:
        """Why the engine died, if it did."""
        return self._death

    # -- requests (event loop) --------------------------------------------------------------------------------

    async def submit(self, requests: tuple[EngineRequest, ...]) -> AsyncGenerator[SequenceOutput]:
        if not self.is_alive:
            raise NotReady(f"The engine is not running: {self._death or 'it was stopped'}.")
        queue: asyncio.Queue[SequenceOutput] = asyncio.Queue()
        running = {request.seq_id for request in requests}
        self._streams.update(dict.fromkeys(running, queue))
        for request in requests:
            self._inbox.put(request)
        try:
            while running:
                output = await queue.get()
                if output.finish_reason is not None:
                    running.discard(output.seq_id)
                yield output
        finally:
            for request in requests:
                self._streams.pop(request.seq_id, None)
            if running:  # the client went away, or the output side has seen enough
                self._inbox.put(Abort(tuple(running)))

    def abort(self, seq_ids: tuple[str, ...]) -> None:
        self._inbox.put(Abort(seq_ids))

    async def command(self, name: str, **arguments: Any) -> Any:
        if not self.is_alive:
            raise NotReady(f"The engine is not running: {self._death or 'it was stopped'}.")
        assert self._loop is not None
        command_id = next(self._command_ids)
        future: asyncio.Future[Any] = self._loop.create_future()
        self._commands[command_id] = future
        self._inbox.put(Command(command_id, name, arguments))
        return await future

    def _deliver(self, item: StepOutput | CommandResult) -> None:
        if isinstance(item, CommandResult):
            future = self._commands.pop(item.command_id, None)
            if future is None or future.done():  # who asked is gone
                return
            if item.error is not None:
                future.set_exception(ValueError(item.error))
            else:
                future.set_result(item.value)
            return
        for answer in item.answers:
            self._deliver(answer)
        for output in item.outputs:
            queue = self._streams.get(output.seq_id)
            if queue is not None:
                queue.put_nowait(output)

    def _fail_all(self, reason: str) -> None:
        failure = Failure("engine_stopped", reason)
        for seq_id, queue in list(self._streams.items()):
            queue.put_nowait(SequenceOutput(seq_id, finish_reason=FinishReason.ERROR, failure=failure))
        for future in self._commands.values():
            if not future.done():
                future.set_exception(NotReady(reason))
        self._commands.clear()

    def _died(self, reason: str) -> None:
        self._death = reason
        self._fail_all(f"The engine died: {reason}.")
        self._on_death(reason)

    # -- the engine's thread ----------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            engine, info = self._make_engine(self._wake)
        except BaseException as error:  # handed to whoever awaits start()
            self._post(self._set_started, error)
            return
        self._post(self._set_started, info)
        try:
            self._serve(engine)
        except EngineDied as error:
            logger.error("engine died", reason=str(error), traceback=engine.last_error)
            self._post(self._died, str(error))
        except Exception as error:
            logger.exception("engine thread failed")
            self._post(self._died, f"{type(error).__name__}: {error}")
        finally:
            engine.close()

    def _serve(self, engine: Engine) -> None:
        is_idle = True
        reported = None
        while not self._stopping.is_set():
            self._drain_inbox(engine, block=is_idle)
            if not engine.has_work:
                if not is_idle:
                    engine.check_integrity()
                is_idle = True
                continue
            output = engine.step()
            if output.outputs or output.answers:
                self._post(self._deliver, output)
            if engine.last_error is not reported:
                reported = engine.last_error
                logger.error("a step failed; its requests were ended", traceback=reported)
            is_idle = engine.is_stalled

    def _drain_inbox(self, engine: Engine, *, block: bool) -> None:
        """Take in everything that has arrived; `block` until there is something (a wake-up counts), or for a moment
        while a proof waits, which has a deadline."""
        patience = _PATIENCE if engine.has_work else None
        while True:
            try:
                item = self._inbox.get(block, patience)
            except Empty:
                return
            block = False
            if isinstance(item, EngineRequest):
                refused = engine.add(item)
                if refused is not None:
                    self._post(self._deliver, StepOutput(0, (refused,)))
            elif isinstance(item, Abort):
                for seq_id in item.seq_ids:
                    engine.abort(seq_id)
            elif isinstance(item, Command):
                answer = engine.take(item)
                if answer is not None:
                    self._post(self._deliver, answer)

    def _wake(self) -> None:
        self._inbox.put(None)

    def _set_started(self, result: EngineInfo | BaseException) -> None:
        assert self._started is not None
        if self._started.cancelled():
            return
        if isinstance(result, BaseException):
            self._started.set_exception(result)
        else:
            self._started.set_result(result)

    def _post(self, callback: Callable[..., None], *arguments: Any) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:  # the loop is closed: nobody is left to tell
            self._stopping.set()
