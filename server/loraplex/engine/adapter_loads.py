"""AdapterLoads: reading adapters from disk into RAM beside the running steps.

Single-flight by construction: the scheduler starts a load only for what is neither resident nor loading. Results are
collected by the engine thread with `poll()`; `on_finish` is called from a worker thread and only wakes the engine.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Protocol

from loraplex.errors import AdapterLoadFailed, LoraplexError

if TYPE_CHECKING:
    from loraplex.lora.weights import LoRAWeights


class ReadAdapter(Protocol):
    def __call__(self, digest: str, on_files: Callable[[], object], /) -> "LoRAWeights":
        """The adapter, called in a worker thread. `on_files` is called when its files are in memory and verified, and
        only their conversion is left. Raises AdapterLoadFailed or OSError."""
        ...


@dataclass(frozen=True, slots=True)
class FinishedLoad:
    """`disk_seconds`: reading and verifying the files; `convert_seconds`: from them to the weights."""

    digest: str
    weights: "LoRAWeights | None" = None
    error: LoraplexError | None = None
    disk_seconds: float = 0.0
    convert_seconds: float = 0.0


class AdapterLoads:
    def __init__(self, read: ReadAdapter, max_concurrent: int, on_finish: Callable[[], None] = lambda: None):
        self._read = read
        self._on_finish = on_finish
        self._finished: SimpleQueue[FinishedLoad] = SimpleQueue()
        self._executor = ThreadPoolExecutor(max_concurrent, thread_name_prefix="adapter-load")

    def start(self, digest: str) -> None:
        self._executor.submit(self._run, digest)

    @property
    def has_finished(self) -> bool:
        """Whether `poll` would return something."""
        return not self._finished.empty()

    def poll(self) -> list[FinishedLoad]:
        """The loads that ended since the last call."""
        finished = []
        while True:
            try:
                finished.append(self._finished.get_nowait())
            except Empty:
                return finished

    def wait(self, timeout: float) -> list[FinishedLoad]:
        """Like `poll`, but waits up to `timeout` seconds for the first."""
        try:
            first = self._finished.get(timeout=timeout)
        except Empty:
            return []
        return [first, *self.poll()]

    def close(self) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _run(self, digest: str) -> None:
        marks = [time.perf_counter()]
        try:
            weights = self._read(digest, lambda: marks.append(time.perf_counter()))
            started, read = marks[0], marks[-1]
            result = FinishedLoad(
                digest, weights, disk_seconds=read - started, convert_seconds=time.perf_counter() - read
            )
        except LoraplexError as error:
            result = FinishedLoad(digest, error=error)
        except Exception as error:  # a load must answer, whatever happens in it
            message = f"Adapter {digest[:12]} could not be read: {type(error).__name__}: {error}."
            result = FinishedLoad(digest, error=AdapterLoadFailed(message))
        self._finished.put(result)
        self._on_finish()
