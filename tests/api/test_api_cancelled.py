"""Cancelled while a thread takes a hold on files, as by a client that leaves then: the hold is let go, and so is the
place in a route's queue."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from folders import save_adapter
from live import LiveServer

from loraplex.api.files import held_files
from loraplex.errors import ModelNotFound
from loraplex.service import Service
from loraplex.serving.generation_request import GenerationRequest


async def generate(service: Service) -> None:
    generation = await service.generate(GenerationRequest(model="red", prompts=["a"], max_tokens=1))
    await generation.close()


async def look_at_text(service: Service) -> None:
    async with service.text_of("red"):
        pass


async def look_at_files(service: Service) -> None:
    async with held_files(service, "red"):
        pass


async def prefetch(service: Service) -> None:
    await service.tiers.prefetch("red", to="ram")


async def pin(service: Service) -> None:
    await service.tiers.pin("red", who="me")


class Slow:
    """A function that waits in its thread until it is let on."""

    def __init__(self, function: Callable[..., Any]):
        self._function = function
        self._entering, self._go_on = threading.Event(), threading.Event()

    def __call__(self, *args: Any) -> Any:
        self._entering.set()
        assert self._go_on.wait(30)
        return self._function(*args)

    async def cancel_within(self, work: Coroutine[Any, Any, object]) -> None:
        """Cancel `work` while a thread of its is in here."""
        task = asyncio.ensure_future(work)
        await asyncio.to_thread(self._entering.wait, 30)
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=0.05)
        self._go_on.set()
        assert not done, "it ended while a thread was at work for it"
        with pytest.raises(asyncio.CancelledError):
            await task


WAYS = (generate, look_at_text, look_at_files, prefetch, pin)


@pytest.mark.parametrize("way", WAYS, ids=[way.__name__ for way in WAYS])
def test_cancelled_while_a_hold_is_taken(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch, way: Callable[[Service], Coroutine[Any, Any, None]]
):
    store = server.service.catalog.store
    slow = Slow(store.acquire)
    monkeypatch.setattr(store, "acquire", slow)
    server.call(slow.cancel_within(way(server.service)))
    assert not store._holds
    monkeypatch.undo()
    server.call(way(server.service))  # and nothing stands in the way of the next
    if way is pin:
        server.call(server.service.tiers.unpin("red", who="me"))


@pytest.mark.parametrize("step", ["prepare", "publish"])
def test_an_acceptance_that_is_cancelled_leaves_nothing_half(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch, base_folder: Path, tmp_path: Path, step: str
):
    service = server.service
    catalog, store = service.catalog, service.catalog.store
    folder = save_adapter(base_folder, tmp_path / "late", seed=77, r=2)
    slow = Slow(getattr(catalog, step))

    async def cancelled() -> None:
        with store.import_folder(folder) as staging:
            await slow.cancel_within(service.acceptance.upload("late", staging, "me"))

    before = store.digests()
    monkeypatch.setattr(catalog, step, slow)
    server.call(cancelled())
    assert not store._holds
    if step == "prepare":
        assert store.digests() == before, "a blob that no version names"
        with pytest.raises(ModelNotFound):
            catalog.get("late")
    else:
        version = catalog.get("late")
        assert store.path(version.digest).is_dir(), "a version without files"
        server.call(service.delete_adapter("late", who="me"))
        assert store.digests() == before
