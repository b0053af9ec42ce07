"""TemplateSandbox: renders the chat templates that adapters bring, in confined worker processes.

An adapter's template is a stranger's program. jinja2's sandbox keeps it from Python's internals and bounds neither its
time nor its memory, so it runs in a process of its own that can be killed.

Fairness: a template has at most one worker at a time, and of those that wait the one that was served longest ago comes
next; so one slow template delays its own requests and leaves a worker to the others. One that ran into a limit is
refused at once for a while.
"""

import asyncio
import contextlib
import hashlib
import itertools
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from cachetools import TTLCache

from loraplex.errors import NotReady, Overloaded
from loraplex.text.child import Child, ChildDied, ChildNotStarted, ChildTimeout

WORKER = "loraplex.text.template_worker"
NUM_WORKERS = 2
MAX_WAITING_PER_TEMPLATE = 64
_MAX_JOB_BYTES = 1 << 28  # a body of 8 MiB, every character of it escaped, with room


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxLimits:
    """Of one rendering: seconds of the wall clock and of the processor, bytes, characters of its result. A template
    that ran into one is refused for `pause_seconds`."""

    wall_seconds: float = 5.0
    cpu_seconds: int = 2
    memory_bytes: int = 256 << 20
    max_chars: int = 4_000_000
    pause_seconds: float = 10.0


class TemplateFailed(Exception):
    """A template gave no text. `kind`: "syntax" (it does not compile), "security" (it reaches for what templates may
    not have), "raised" (its own raise_exception), "failed" (another error while it ran), "limit" (time, memory or
    length)."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind
        self.message = message


class TemplateSandbox:
    """Used from one event loop. Workers start when they are first needed. Closed by `close`."""

    def __init__(self, limits: SandboxLimits = SandboxLimits(), num_workers: int = NUM_WORKERS):
        self._limits = limits
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="templates")
        self._idle: list[_Worker] = [_Worker(limits) for _ in range(num_workers)]
        self._workers = tuple(self._idle)
        self._rendering: set[str] = set()
        self._waiting: list[_Ticket] = []
        self._served: dict[str, int] = {}  # template -> when it was last served, while it waits or renders
        self._clock = itertools.count(1)
        self._paused: TTLCache[str, str] = TTLCache(4096, limits.pause_seconds, timer=time.monotonic)
        self._is_closed = False

    async def render(
        self,
        source: str,
        messages: Sequence[Mapping[str, Any]],
        special_tokens: Mapping[str, str],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        is_check: bool = False,
    ) -> str:
        """The text that `source` makes of `messages`, as transformers' apply_chat_template has it. Raises
        TemplateFailed, Overloaded when too many wait for this template, NotReady when no process can be started.
        `is_check`: refuse what names other templates, too."""
        key = hashlib.sha256(source.encode(errors="surrogatepass")).hexdigest()
        job = {
            "source": source,
            "messages": [{name: value for name, value in one.items() if value is not None} for one in messages],
            "special_tokens": dict(special_tokens),
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "is_check": is_check,
        }
        worker = await self._take(key)
        running = asyncio.get_running_loop().run_in_executor(self._threads, worker.render, job)
        # Also when the client has gone: the worker is free when its thread is.
        running.add_done_callback(lambda done: self._give_back(key, worker, done))
        return await asyncio.shield(running)

    async def close(self) -> None:
        """End the workers; what renders now fails."""
        self._is_closed = True
        for ticket in self._waiting:
            ticket.turn.cancel()
        for worker in self._workers:
            worker.kill()
        await asyncio.to_thread(self._threads.shutdown)
        for worker in self._workers:
            worker.close()

    async def _take(self, key: str) -> "_Worker":
        self._refuse_paused(key)
        waiting = sum(ticket.key == key for ticket in self._waiting)
        if waiting >= MAX_WAITING_PER_TEMPLATE:
            raise Overloaded(
                f"{waiting} requests wait for this adapter's chat template already. Try again in a moment.",
                retry_after=2,
            )
        ticket = _Ticket(key, next(self._clock), asyncio.get_running_loop().create_future())
        self._waiting.append(ticket)
        self._dispatch()
        try:
            return await ticket.turn
        except asyncio.CancelledError:
            if ticket.turn.done() and not ticket.turn.cancelled() and not ticket.turn.exception():
                self._release(key, ticket.turn.result())
            raise
        finally:
            if ticket in self._waiting:
                self._waiting.remove(ticket)

    def _dispatch(self) -> None:
        """Give idle workers to those whose turn it is."""
        while self._idle and (able := [one for one in self._waiting if one.key not in self._rendering]):
            ticket = min(able, key=lambda one: (self._served.get(one.key, 0), one.arrival))
            self._waiting.remove(ticket)
            if ticket.turn.done():  # its request has gone
                continue
            self._served[ticket.key] = next(self._clock)
            self._rendering.add(ticket.key)
            ticket.turn.set_result(self._idle.pop())

    def _give_back(self, key: str, worker: "_Worker", done: "asyncio.Future[str]") -> None:
        error = None if done.cancelled() else done.exception()
        if isinstance(error, TemplateFailed) and error.kind == "limit" and not self._is_closed:
            self._paused[key] = error.message
            for ticket in self._waiting:
                if ticket.key == key and not ticket.turn.done():
                    ticket.turn.set_exception(self._pause_of(key))
        if worker.is_running or self._is_closed:
            self._release(key, worker)
            return
        # A new process takes a while: until it is there, others go to the other worker.
        starting = asyncio.get_running_loop().run_in_executor(self._threads, worker.start)
        starting.add_done_callback(lambda done: self._release(key, worker))

    def _release(self, key: str, worker: "_Worker") -> None:
        self._rendering.discard(key)
        self._idle.append(worker)
        self._dispatch()
        if key not in self._rendering and all(ticket.key != key for ticket in self._waiting):
            self._served.pop(key, None)

    def _refuse_paused(self, key: str) -> None:
        if key in self._paused:
            raise self._pause_of(key)

    def _pause_of(self, key: str) -> TemplateFailed:
        why = self._paused.get(key, "")
        return TemplateFailed("limit", f"{why}; it is not tried again for {self._limits.pause_seconds:g} s")


@dataclass(frozen=True, slots=True, eq=False)
class _Ticket:
    key: str
    arrival: int
    turn: "asyncio.Future[_Worker]"


class _Worker:
    """One worker process, replaced when it ends. `render` is called by one thread at a time, `kill` by any."""

    def __init__(self, limits: SandboxLimits):
        self._limits = limits
        self._child: Child | None = None
        self._is_stopping = False

    def render(self, job: dict[str, Any]) -> str:
        """Raises TemplateFailed."""
        answer = self._try(job)
        if answer is None or answer.get("kind") == "memory":
            # Another template's leavings may have been in the way: once more, in a fresh process.
            self.close()
            answer = self._try(job)
            if answer is None:
                raise TemplateFailed("limit", "it ended the process that renders templates (memory or nesting)")
        if "text" in answer:
            return answer["text"]
        kind = str(answer["kind"])
        raise TemplateFailed("limit" if kind in ("memory", "long") else kind, str(answer["message"]))

    def _try(self, job: dict[str, Any]) -> dict[str, Any] | None:
        """The answer; None when the process died. Raises NotReady."""
        limits = self._limits
        try:
            return self._running().exchange(job, limits.wall_seconds, 6 * limits.max_chars + (1 << 16))
        except ChildTimeout as error:
            raise TemplateFailed("limit", f"it took longer than {limits.wall_seconds:g} s") from error
        except ChildNotStarted as error:
            self.close()
            raise NotReady(
                f"Chat templates of adapters cannot be rendered: their process does not start ({error}). The server's "
                "log says more."
            ) from error
        except ChildDied as error:
            if error.is_out_of_time:
                raise TemplateFailed("limit", f"it took more than {limits.cpu_seconds} s of processor time") from error
            return None

    @property
    def is_running(self) -> bool:
        return self._child is not None and self._child.is_alive

    def start(self) -> None:
        """Have the process ready; if it cannot be started, the next rendering says so."""
        with contextlib.suppress(ChildDied, ChildNotStarted):
            self._running()

    def _running(self) -> Child:
        if self._child is None or not self._child.is_alive:
            self.close()
            limits = self._limits
            self._child = Child(
                WORKER,
                {
                    "memory_bytes": limits.memory_bytes,
                    "cpu_seconds": limits.cpu_seconds,
                    "max_chars": limits.max_chars,
                    "max_job_bytes": _MAX_JOB_BYTES,
                },
            )
            if self._is_stopping:
                self.close()
                raise ChildDied("the server stops")
            self._child.prepare()
        return self._child

    def kill(self) -> None:
        """From any thread: what renders fails, and nothing more is rendered."""
        self._is_stopping = True
        if (child := self._child) is not None:
            child.kill()

    def close(self) -> None:
        if self._child is not None:
            child, self._child = self._child, None
            child.close()
