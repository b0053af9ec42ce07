"""AdapterCopies: adapters on their way from RAM into places on the device, beside the running steps.

    start   the place is emptied and the copy begins     the slab stays where it is, nobody uses the place
    poll    the copies that have ended                   from the next step on kernels find these adapters

Nothing but an ended copy is ever entered in the pool, so no kernel can meet half an adapter. Called by the engine's
thread only; `AdapterSwaps` keeps the books.
"""

import time
from collections.abc import Collection
from dataclasses import dataclass, replace

import torch

from loraplex.engine.adapter_pool import AdapterPool
from loraplex.engine.copy_stream import CopyEvent, CopyStream
from loraplex.engine.device_errors import describe, is_device_error, is_out_of_memory
from loraplex.engine.messages import Failure
from loraplex.lora.weights import LoRAWeights


@dataclass(frozen=True, slots=True)
class FinishedCopy:
    """`failure` None: the adapter stands in its place."""

    digest: str
    failure: Failure | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Copy:
    """`room`: where the slab is copied to. Holds both, so that neither's memory is given away meanwhile."""

    place: int
    weights: LoRAWeights
    room: torch.Tensor
    event: CopyEvent
    started: float


class AdapterCopies:
    def __init__(self, pool: AdapterPool, stream: CopyStream):
        self._pool = pool
        self._stream = stream
        self._under_way: dict[str, _Copy] = {}  # in the order of their start
        self._failed: list[FinishedCopy] = []

    def start(self, place: int, weights: LoRAWeights) -> None:
        """Begin to copy an adapter into `place`. What goes wrong comes with `poll`, unless the device is lost."""
        try:
            room = self._pool.make_room(place, weights.slab)
            event = self._stream.copy(weights.slab, room)
        except Exception as error:
            self._failed.append(self._fail(place, weights.digest, error))
        else:
            self._under_way[weights.digest] = _Copy(place, weights, room, event, time.perf_counter())

    @property
    def is_busy(self) -> bool:
        """Whether a copy is under way, or one that failed has not been told of."""
        return bool(self._under_way or self._failed)

    def poll(self) -> list[FinishedCopy]:
        """The copies that ended since the last call, their adapters entered in the pool."""
        finished, self._failed = self._failed, []
        for digest, copy in list(self._under_way.items()):
            if copy.event.query():
                del self._under_way[digest]
                finished.append(self._enter(copy))
        return finished

    def wait(self) -> None:
        """Until the first of them has ended: there is nothing else to do."""
        for copy in self._under_way.values():
            copy.event.synchronize()
            return

    def close(self) -> None:
        """Until all have ended: their memory is about to go."""
        for copy in self._under_way.values():
            copy.event.synchronize()

    def _enter(self, copy: _Copy) -> FinishedCopy:
        digest = copy.weights.digest
        try:
            self._pool.enter(copy.place, replace(copy.weights, slab=copy.room))
        except Exception as error:
            return self._fail(copy.place, digest, error)
        self._pool.copies.observe(time.perf_counter() - copy.started)
        return FinishedCopy(digest)

    def _fail(self, place: int, digest: str, error: Exception) -> FinishedCopy:
        if is_device_error(error):
            raise error
        self._pool.clear(place)
        if is_out_of_memory(error):
            failure = Failure(
                "insufficient_memory",
                f"The device has no memory for the adapter {digest[:12]}, which is larger than a place. Start the "
                "server with a lower --gpu-memory-utilization (or --kv-cache-bytes), so that more is left, or with a "
                "larger --max-lora-rank, so that places are larger.",
            )
        else:
            message = f"The adapter {digest[:12]} could not be copied to the device: {describe(error)}."
            failure = Failure("adapter_load_failed", message)
        return FinishedCopy(digest, failure)

    def check_integrity(self, expected: Collection[str]) -> None:
        """`expected`: the adapters whose copies the books say are under way."""
        failed = {one.digest for one in self._failed}
        assert self._under_way.keys() | failed == set(expected), "the books differ on which copies are under way"
        for digest, copy in self._under_way.items():
            assert self._pool.digest_in(copy.place) is None, f"adapter {digest} is entered before it has arrived"
