"""WaitingQueue: who is next, fairly between adapters.

Sequences of one composition form a line and are served in the order of their arrival, preempted ones included. Between
lines two rules hold:

1. A line of which nothing runs and that has waited for `quantum` steps is overdue. Overdue lines come first, the one
   that has waited longest before the others. This bounds everybody's wait.
2. Otherwise the line that was served least comes first: the virtual token counter of Sheng et al. (OSDI'24, "Fairness
   in Serving Large Language Models", algorithm 2) with compositions as its clients. A line that starts to wait is
   lifted to the smallest counter of those that wait: having been idle earns no credit. A line without any sequence is
   forgotten.
"""

from bisect import insort
from collections.abc import Iterator

from loraplex.engine.messages import Composition
from loraplex.engine.sequence import Sequence


class Line:
    """The sequences of one composition that are waiting, and what is known of those that run."""

    __slots__ = ("composition", "digests", "idle_since", "num_running", "served", "waiting")

    def __init__(self, composition: Composition):
        self.composition = composition
        self.digests = frozenset(use.digest for use in composition)
        self.waiting: list[Sequence] = []  # by arrival
        self.num_running = 0
        self.served = 0  # tokens scheduled
        self.idle_since = 0  # the step since which something waits and nothing runs; holds only while that is so


class WaitingQueue:
    def __init__(self, quantum: int) -> None:
        self._quantum = quantum
        self._lines: dict[Composition, Line] = {}
        self._level = 0  # the largest counter at which a line was admitted: where a lone newcomer starts

    def __len__(self) -> int:
        return sum(len(line.waiting) for line in self._lines.values())

    def __iter__(self) -> Iterator[Sequence]:
        for line in self._lines.values():
            yield from line.waiting

    def line_of(self, seq: Sequence) -> Line:
        return self._lines[seq.request.composition]

    @property
    def lines(self) -> list[Line]:
        """Lines in which something waits."""
        return [line for line in self._lines.values() if line.waiting]

    def in_order(self, step: int) -> list[Line]:
        """`lines`, in the order in which they deserve service."""
        return sorted(self.lines, key=lambda line: self.turn(line, step))

    def turn(self, line: Line, step: int) -> tuple[int, int, int]:
        """What `in_order` sorts by: smaller is sooner."""
        head = line.waiting[0].arrival
        return (0, line.idle_since, head) if self.is_overdue(line, step) else (1, line.served, head)

    def is_overdue(self, line: Line, step: int) -> bool:
        return not line.num_running and step - line.idle_since >= self._quantum

    def push(self, seq: Sequence, step: int) -> None:
        """Queue a sequence that has arrived."""
        line = self._lines.get(seq.request.composition)
        if line is None:
            line = self._lines[seq.request.composition] = Line(seq.request.composition)
        if not line.waiting:
            level = min((other.served for other in self._lines.values() if other.waiting), default=self._level)
            line.served = max(line.served, level)
        self._enqueue(line, seq, step)

    def admit(self, line: Line) -> Sequence:
        """Take the head of `line` out; it runs now."""
        self._level = max(self._level, line.served)
        line.num_running += 1
        return line.waiting.pop(0)

    def preempt(self, seq: Sequence, step: int) -> None:
        """A running sequence waits again, at the place of its arrival."""
        line = self.line_of(seq)
        line.num_running -= 1
        self._enqueue(line, seq, step)
        if not line.num_running:
            line.idle_since = step

    def stop_running(self, seq: Sequence, step: int) -> None:
        """A running sequence has ended."""
        line = self.line_of(seq)
        line.num_running -= 1
        if not line.num_running:
            line.idle_since = step
        self._forget(line)

    def remove(self, seq: Sequence) -> None:
        """Take a waiting sequence out for good."""
        line = self.line_of(seq)
        line.waiting.remove(seq)
        self._forget(line)

    def _enqueue(self, line: Line, seq: Sequence, step: int) -> None:
        if not line.waiting and not line.num_running:
            line.idle_since = step
        insort(line.waiting, seq, key=lambda other: other.arrival)

    def _forget(self, line: Line) -> None:
        if not line.waiting and not line.num_running:
            del self._lines[line.composition]

    def check_integrity(self, running: list[Sequence]) -> None:
        counts: dict[Composition, int] = {}
        for seq in running:
            counts[seq.request.composition] = counts.get(seq.request.composition, 0) + 1
        for composition, line in self._lines.items():
            assert line.num_running == counts.pop(composition, 0), "a running count is off"
            assert line.waiting or line.num_running, "an empty line was kept"
            arrivals = [seq.arrival for seq in line.waiting]
            assert arrivals == sorted(arrivals), "a line is not in the order of arrival"
        assert not counts, "a running sequence has no line"
