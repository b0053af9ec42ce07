"""What is looked up by name and held by its files, when it is deleted or replaced between the two."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from three_tiers import Clock, Inline, Server, bench

from loraplex.errors import AdapterLoadFailed, ModelNotFound
from loraplex.lora.version import Version


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    loop = asyncio.new_event_loop()
    loop.set_default_executor(Inline(1))
    server = Server(tmp_path / "data", loop, Clock(), on_evict=lambda digest: None)
    server.finish(server.upload("a", 0))
    yield server
    server.close()
    loop.close()


def pin(server: Server, name: str) -> Version:
    return server.finish(server.service.tiers.pin(name, who="me"))


def prefetch(server: Server, name: str) -> Version:
    return server.finish(server.service.tiers.prefetch(name, to="ram"))


def hold(server: Server, name: str) -> Version:
    with server.catalog.holding(lambda: server.catalog.get(name)) as (version, folder):
        assert folder == server.store.path(version.digest)
        assert server.store._holds[version.digest] == 1
    assert not server.store._holds
    return version


ways = pytest.mark.parametrize("way", [pin, prefetch, hold])


def before_the_files_are_held(server: Server, monkeypatch: pytest.MonkeyPatch, change: Callable[[], object]) -> None:
    acquire, changes = server.store.acquire, [change]

    def changed(digest: str) -> Any:
        if changes:
            changes.pop()()
        return acquire(digest)

    monkeypatch.setattr(server.store, "acquire", changed)


def forget(server: Server) -> None:
    server.catalog.delete("a", 1, who="me")
    server.catalog.sweep()


@ways
def test_what_is_deleted_meanwhile_is_not_there(server: Server, monkeypatch: pytest.MonkeyPatch, way: Callable):
    before_the_files_are_held(server, monkeypatch, lambda: forget(server))
    with pytest.raises(ModelNotFound):
        way(server, "a")


@ways
def test_what_replaces_it_is_meant(server: Server, monkeypatch: pytest.MonkeyPatch, way: Callable):
    server.finish(server.upload("a", 1))
    server.catalog.rollback("a", 1, who="me")
    before_the_files_are_held(server, monkeypatch, lambda: forget(server))
    found = way(server, "a")
    assert (found.version, found.digest) == (2, bench().contents[1].digest)


@ways
def test_lost_files_are_said_to_be_lost(server: Server, monkeypatch: pytest.MonkeyPatch, way: Callable):
    blob = server.store.path(bench().contents[0].digest)
    before_the_files_are_held(server, monkeypatch, lambda: blob.rename(blob.parent.parent / "elsewhere"))
    with pytest.raises(AdapterLoadFailed, match="Push the adapter again"):
        way(server, "a")
