"""AdapterLoads: reading adapters from disk into RAM beside the running steps.

Single-flight by construction: the scheduler starts a load only for what is neither resident nor loading. Results are
collected by the engine thread with `poll()`; `on_finish` is called from a worker thread and only wakes the engine.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from loraplex.errors import AdapterLoadFailed, LoraplexError

if TYPE_CHECKING:
    from loraplex.lora.weights import LoRAWeights

ReadAdapter = Callable[[str], "LoRAWeights"]
"""digest -> weights, called in a worker thread; raises AdapterLoadFailed or OSError."""


@dataclass(frozen=True, slots=True)
class FinishedLoad:
    digest: str
    weights: "LoRAWeights | None" = None
    error: LoraplexError | None = None


class AdapterLoads:
    def __init__(self, read: ReadAdapter, max_concurrent: int, on_finish: Callable[[], None] = lambda: None):
        self._read = read
        self._on_finish = on_finish
        self._finished: SimpleQueue[FinishedLoad] = SimpleQueue()
        self._executor = ThreadPoolExecutor(max_concurrent, thread_name_prefix="adapter-load")

    def start(self, digest: str) -> None:
        self._executor.submit(self._run, digest)

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
        try:
            result = FinishedLoad(digest, weights=self._read(digest))
        except LoraplexError as error:
            result = FinishedLoad(digest, error=error)
        except Exception as error:  # a load must answer, whatever happens in it
            message = f"Adapter {digest[:12]} could not be read: {type(error).__name__}: {error}."
            result = FinishedLoad(digest, error=AdapterLoadFailed(message))
        self._finished.put(result)
        self._on_finish()
