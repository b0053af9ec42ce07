"""Who is next: the least served line, nothing for having been idle, the overdue first, arrival within a line."""

import pytest
from scheduler_rig import make_sequence, uses

from loraplex.engine.sequence import Sequence
from loraplex.engine.waiting_queue import Line, WaitingQueue

A, B, C = uses("a"), uses("b"), uses("c")
FAR = 1_000_000


class Clients:
    """A queue and the sequences put into it."""

    def __init__(self, quantum: int = FAR):
        self.queue = WaitingQueue(quantum)
        self.count = 0

    def push(self, composition, step: int = 0) -> Sequence:
        seq = make_sequence(str(self.count), [1], composition, arrival=self.count)
        self.count += 1
        self.queue.push(seq, step)
        return seq

    def serve(self, composition, num_tokens: int) -> Sequence:
        """Admit the head and give it tokens."""
        line = self.line(composition)
        seq = self.queue.admit(line)
        line.served += num_tokens
        return seq

    def line(self, composition) -> Line:
        return self.queue._lines[composition]

    def order(self, step: int = 0) -> list:
        return [line.composition for line in self.queue.in_order(step)]


def test_first_come_first_served_within_a_line_and_between_equals():
    clients = Clients()
    first, second = clients.push(A), clients.push(A)
    clients.push(B)
    assert clients.order() == [A, B]
    assert clients.serve(A, 0) is first
    assert clients.serve(A, 0) is second
    assert clients.order() == [B]
    assert len(clients.queue) == 1


def test_the_least_served_is_next():
    clients = Clients()
    for composition in (A, A, B, B, C):
        clients.push(composition)
    clients.serve(A, 100)
    assert clients.order() == [B, C, A]
    clients.serve(B, 150)
    assert clients.order() == [C, A, B]


def test_idling_earns_no_credit():
    """Who comes back starts where the least served of those that wait stands, not where it left."""
    clients = Clients()
    early = clients.push(C)
    clients.queue.admit(clients.line(C))
    clients.queue.stop_running(early, 0)
    assert C not in clients.queue._lines
    for _ in range(3):
        clients.push(A)
        clients.push(B)
    clients.serve(A, 500)
    clients.serve(B, 700)
    clients.push(C)
    assert clients.line(C).served == 500
    assert clients.order() == [A, C, B]


def test_a_trickle_holds_no_newcomer_down():
    """A line with little demand keeps a low counter; it says nothing about those that wait."""
    clients = Clients()
    clients.push(B)
    clients.serve(B, 3)  # runs, and nothing more of it waits
    clients.push(A)
    clients.serve(A, 900)
    clients.push(A)
    clients.push(C)
    assert clients.line(C).served == 900
    clients.push(B)
    assert clients.line(B).served == 900, "nor does it save up for itself"


def test_a_lone_newcomer_starts_at_the_level_of_service():
    clients = Clients()
    clients.push(A)
    clients.push(A)
    clients.serve(A, 400)
    clients.serve(A, 400)
    clients.push(B)
    assert clients.line(B).served == 400


def test_preempted_ones_keep_their_turn_and_their_counter():
    clients = Clients()
    first, second = clients.push(A), clients.push(A)
    third = clients.push(A)
    clients.push(B)
    clients.serve(A, 10)
    clients.serve(A, 10)
    for seq in (first, second):
        clients.queue.preempt(seq, 0)
    assert clients.line(A).waiting == [first, second, third]
    assert clients.line(A).served == 20
    clients.queue.check_integrity([])


def test_the_overdue_come_first_by_how_long_they_wait():
    clients = Clients(quantum=10)
    clients.push(A, step=0)
    clients.push(A, step=0)
    clients.push(B, step=3)
    clients.push(C, step=1)
    clients.serve(A, 0)
    clients.line(B).served = 500
    clients.line(C).served = 600
    assert clients.order(step=10) == [A, B, C], "nobody is overdue yet"
    assert clients.order(step=11) == [C, A, B]
    assert clients.order(step=13) == [C, B, A], "of A something runs"


def test_the_clock_starts_when_the_last_one_stops():
    clients = Clients(quantum=10)
    first, second = clients.push(A, 0), clients.push(A, 0)
    clients.push(A, 0)
    clients.serve(A, 0)
    clients.serve(A, 0)
    line = clients.line(A)
    clients.queue.stop_running(first, 20)
    assert not clients.queue.is_overdue(line, 100)
    clients.queue.preempt(second, 30)
    assert not clients.queue.is_overdue(line, 39)
    assert clients.queue.is_overdue(line, 40)
    clients.push(A, 39)
    assert clients.queue.is_overdue(line, 40), "an arrival does not set it back"


def test_removal():
    clients = Clients()
    first, second = clients.push(A), clients.push(A)
    clients.queue.remove(second)
    assert list(clients.queue) == [first]
    clients.queue.remove(first)
    assert not clients.queue._lines
    with pytest.raises(KeyError):
        clients.queue.remove(first)


def test_integrity_notices():
    clients = Clients()
    clients.push(A)
    seq = clients.serve(A, 0)
    clients.queue.check_integrity([seq])
    with pytest.raises(AssertionError):
        clients.queue.check_integrity([])
    with pytest.raises(AssertionError):
        clients.queue.check_integrity([seq, make_sequence("x", [1], B)])
