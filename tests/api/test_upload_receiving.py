"""How an upload's body reaches the staging: whatever ends it, no thread writes for it after."""

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from loraplex.api import receiving as receiving_module
from loraplex.api.receiving import receive
from loraplex.serving.background import Background

PIECE = b"x" * (1 << 20)


class SlowBody:
    """Takes each piece when it is let go on, and knows whether it is at work."""

    def __init__(self, failure: Exception | None = None):
        self.taken: list[bytes] = []
        self.at_work = threading.Event()
        self.go_on = threading.Event()
        self.is_busy = False
        self._failure = failure

    def feed(self, data: bytes) -> None:
        self.is_busy = True
        self.at_work.set()
        assert self.go_on.wait(30)
        self.taken.append(data)
        self.is_busy = False
        if self._failure is not None:
            raise self._failure


class Asked:
    def __init__(self, pieces: list[bytes], error: Exception | None = None):
        self._pieces = pieces
        self._error = error

    async def stream(self):
        for piece in self._pieces:
            yield piece
        if self._error is not None:
            await asyncio.sleep(0.05)  # the first piece is being fed
            raise self._error


@pytest.fixture
def service():
    background = Background(2)
    yield SimpleNamespace(background=background, num_running=0)
    background.close()


def receiving(asked: Any, body: Any, service: Any) -> asyncio.Task[None]:
    return asyncio.ensure_future(receive(asked, body, service))


async def test_pieces_arrive_in_order(service):
    body = SlowBody()
    body.go_on.set()
    await receiving(Asked([b"a", PIECE, b"b", b"c", PIECE, b"d"]), body, service)
    assert body.taken == [b"a" + PIECE, b"bc" + PIECE, b"d"]


async def test_cancelled_while_a_thread_writes(service):
    body = SlowBody()
    task = receiving(Asked([PIECE, PIECE, PIECE]), body, service)
    await asyncio.to_thread(body.at_work.wait, 30)
    task.cancel()
    done, _ = await asyncio.wait([task], timeout=0.1)
    assert not done, "it ended while a thread was writing"
    body.go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not body.is_busy
    assert len(body.taken) == 1


async def test_the_client_leaves_while_a_thread_writes(service):
    body = SlowBody()
    task = receiving(Asked([PIECE], ConnectionError("gone")), body, service)
    await asyncio.to_thread(body.at_work.wait, 30)
    body.go_on.set()
    with pytest.raises(ConnectionError):
        await task
    assert not body.is_busy


async def test_a_refused_piece_ends_it(service):
    body = SlowBody(ValueError("refused"))
    body.go_on.set()
    with pytest.raises(ValueError, match="refused"):
        await receiving(Asked([PIECE] * 50), body, service)
    assert len(body.taken) <= 2


@pytest.mark.parametrize(
    ("num_running", "seconds", "pauses"),
    [(0, 0.01, []), (3, 0.01, [0.005] * 4), (3, 60.0, [0.02] * 4)],
    ids=["idle", "beside requests", "a slow client"],
)
async def test_it_pauses_behind_every_piece_while_requests_run(
    service, monkeypatch: pytest.MonkeyPatch, num_running: int, seconds: float, pauses: list[float]
):
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    slept: list[float] = []
    sleep = asyncio.sleep

    class Coming(Asked):
        async def stream(self):
            async for piece in super().stream():
                clock.now += seconds
                yield piece

    async def noted(delay: float) -> None:
        slept.append(delay)
        await sleep(0)

    monkeypatch.setattr(receiving_module, "time", clock)
    monkeypatch.setattr(asyncio, "sleep", noted)
    service.num_running = num_running
    body = SlowBody()
    body.go_on.set()
    await receiving(Coming([PIECE, PIECE, PIECE, b"end"]), body, service)
    assert len(body.taken) == 4
    assert slept == pytest.approx(pauses)
