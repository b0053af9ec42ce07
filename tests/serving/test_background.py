"""What a thread takes while its owner is cancelled is let go by the owner."""

import asyncio
import threading
from contextlib import ExitStack, contextmanager

import pytest

from loraplex.serving.background import entered, finished


class Thing:
    """Taken in a thread that waits until it is let on."""

    def __init__(self):
        self.is_held = False
        self.entering = threading.Event()
        self.go_on = threading.Event()

    @contextmanager
    def held(self):
        self.entering.set()
        assert self.go_on.wait(30)
        self.is_held = True
        try:
            yield "it"
        finally:
            self.is_held = False


async def hold(thing: Thing, use: asyncio.Event) -> str:
    with ExitStack() as stack:
        found = await finished(asyncio.to_thread(stack.enter_context, thing.held()), give_up=thing.go_on.set)
        await use.wait()
        return found


async def test_what_comes_of_it_is_returned():
    thing, use = Thing(), asyncio.Event()
    thing.go_on.set()
    use.set()
    assert await hold(thing, use) == "it"
    assert not thing.is_held


async def test_what_goes_wrong_is_raised():
    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await finished(asyncio.to_thread(fail))


async def test_cancelled_it_waits_for_the_thread_however_often():
    thing = Thing()
    given_up = threading.Event()

    async def owner() -> None:
        with ExitStack() as stack:
            await finished(asyncio.to_thread(stack.enter_context, thing.held()), give_up=given_up.set)

    task = asyncio.ensure_future(owner())
    await asyncio.to_thread(thing.entering.wait, 30)
    for _ in range(2):
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=0.05)
        assert not done, "it ended while the thread was at work"
    assert given_up.is_set()
    thing.go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not thing.is_held


async def test_a_thread_that_fails_then_is_no_news():
    entering, go_on = threading.Event(), threading.Event()

    def fail() -> None:
        entering.set()
        go_on.wait(30)
        raise ValueError("no")

    task = asyncio.ensure_future(finished(asyncio.to_thread(fail), give_up=go_on.set))
    await asyncio.to_thread(entering.wait, 30)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_block_is_left_however_it_is_cancelled():
    """While it is entered, and while it is left."""
    thing, leaving = Thing(), threading.Event()
    is_in, never = asyncio.Event(), asyncio.Event()

    @contextmanager
    def slow_to_leave():
        with thing.held() as it:
            try:
                yield it
            finally:
                assert leaving.wait(30)

    async def owner() -> None:
        async with entered(slow_to_leave()) as it:
            assert it == "it"
            is_in.set()
            await never.wait()

    early = asyncio.ensure_future(owner())
    await asyncio.to_thread(thing.entering.wait, 30)
    early.cancel()
    thing.go_on.set()
    leaving.set()
    with pytest.raises(asyncio.CancelledError):
        await early
    assert not thing.is_held
    leaving.clear()
    late = asyncio.ensure_future(owner())
    await is_in.wait()
    assert thing.is_held
    for _ in range(2):
        late.cancel()
        done, _ = await asyncio.wait([late], timeout=0.05)
        assert not done, "it ended before it was left"
    leaving.set()
    with pytest.raises(asyncio.CancelledError):
        await late
    assert not thing.is_held
