"""WaitingQueue: who is next, fairly between adapters.

Sequences of one composition wait first come, first served. Between compositions the one that was served least comes
first: the virtual token counter of Sheng et al. (OSDI'24, "Fairness in Serving Large Language Models") with
compositions as its clients. A flood on one adapter therefore delays its own requests, not those of the others.
A composition that becomes active starts at the smallest counter of the active ones: having been idle earns no credit.
"""

from collections import deque
from collections.abc import Iterator

from loraplex.engine.messages import Composition
from loraplex.engine.sequence import Sequence


class WaitingQueue:
    def __init__(self) -> None:
        self._queues: dict[Composition, deque[Sequence]] = {}
        self._served: dict[Composition, int] = {}  # tokens scheduled, of every active composition
        self._running: dict[Composition, int] = {}  # sequences running

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    def __iter__(self) -> Iterator[Sequence]:
        for queue in self._queues.values():
            yield from queue

    def push(self, seq: Sequence, *, front: bool = False) -> None:
        """Queue `seq`; `front` for one that was preempted and keeps its turn."""
        composition = seq.request.composition
        self._activate(composition)
        queue = self._queues.setdefault(composition, deque())
        if front:
            queue.appendleft(seq)
        else:
            queue.append(seq)

    def compositions(self) -> list[Composition]:
        """Compositions with waiting sequences, in the order in which they deserve service."""
        return sorted(self._queues, key=lambda comp: (self._served[comp], self._queues[comp][0].arrival))

    def head(self, composition: Composition) -> Sequence | None:
        queue = self._queues.get(composition)
        return queue[0] if queue else None

    def admit(self, composition: Composition) -> Sequence:
        """Take the head of `composition` out; it runs now."""
        seq = self._queues[composition].popleft()
        if not self._queues[composition]:
            del self._queues[composition]
        self._running[composition] = self._running.get(composition, 0) + 1
        return seq

    def stop_running(self, seq: Sequence) -> None:
        """A running sequence ended or was preempted (push it again then, before or after)."""
        composition = seq.request.composition
        self._running[composition] -= 1
        if not self._running[composition]:
            del self._running[composition]
        self._deactivate(composition)

    def remove(self, seq: Sequence) -> None:
        """Take a waiting sequence out for good."""
        composition = seq.request.composition
        queue = self._queues[composition]
        queue.remove(seq)
        if not queue:
            del self._queues[composition]
        self._deactivate(composition)

    def serve(self, composition: Composition, num_tokens: int) -> None:
        self._served[composition] += num_tokens

    def served(self, composition: Composition) -> int:
        return self._served[composition]

    def num_running(self, composition: Composition) -> int:
        return self._running.get(composition, 0)

    def _activate(self, composition: Composition) -> None:
        if composition not in self._served:
            self._served[composition] = min(self._served.values(), default=0)

    def _deactivate(self, composition: Composition) -> None:
        if composition not in self._queues and composition not in self._running:
            del self._served[composition]

    def check_integrity(self, running: list[Sequence]) -> None:
        counts: dict[Composition, int] = {}
        for seq in running:
            counts[seq.request.composition] = counts.get(seq.request.composition, 0) + 1
        assert counts == self._running, "the running counts are off"
        assert set(self._served) == set(self._queues) | set(self._running), "a counter has no client"
        assert all(self._queues.values()), "an empty queue was kept"
