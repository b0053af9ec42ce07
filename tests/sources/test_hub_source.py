"""Repositories of a hub, from a small server on loopback that speaks the two routes."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from hub_server import COMMIT, CONFIG, WEIGHTS, Hub, running_hub
from loraplex.errors import (
    AdapterInvalid,
    PickleRefused,
    SourceFailed,
    SourceNotFound,
    SourceRefused,
    SourceUnavailable,
)
from loraplex.lora.store import AdapterStore
from loraplex.sources.allow_list import AllowList
from loraplex.sources.source import Source
from loraplex.sources.transfer import Transfer

TOKEN = "hf_notasecret"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


def source(hub: Hub, text: str = "hf://team/sql", allowed: str = "team/*", token: str | None = None) -> Source:
    return AllowList(repositories=[allowed], hub_endpoint=hub.url, hub_token=token).source(text)


def test_a_repository_at_one_commit(hub: Hub, fetched: Callable[..., dict[str, bytes]]):
    wanted = source(hub)
    assert wanted.shown == "hf://team/sql@main"
    assert fetched(wanted) == {CONFIG: b"{}", WEIGHTS: b"w" * 100_000}
    assert wanted.shown == f"hf://team/sql@{COMMIT}"
    assert [token for _, token in hub.seen] == [None] * 3


def test_the_token_goes_to_the_hub_and_no_further(hub: Hub, fetched: Callable[..., dict[str, bytes]]):
    with running_hub() as other:
        hub.elsewhere = other.url
        assert len(fetched(source(hub, token=TOKEN))[WEIGHTS]) == 100_000
    assert {token for _, token in hub.seen} == {f"Bearer {TOKEN}"}
    assert {token for _, token in other.seen} == {None}


@pytest.mark.parametrize(
    ("status", "error"),
    [(404, SourceNotFound), (401, SourceFailed), (429, SourceUnavailable), (503, SourceUnavailable)],
)
def test_what_the_hub_refuses(hub: Hub, fetched: Callable[..., dict[str, bytes]], status: int, error: type[Exception]):
    hub.answers = [status]
    with pytest.raises(error) as failed:
        fetched(source(hub, token=TOKEN))
    assert type(failed.value) is error
    assert TOKEN not in str(failed.value)


def test_an_answer_that_breaks_off(hub: Hub, fetched: Callable[..., dict[str, bytes]]):
    hub.cut = True
    with pytest.raises(SourceUnavailable, match="broke off"):
        fetched(source(hub))


def test_what_is_no_adapter(hub: Hub, fetched: Callable[..., dict[str, bytes]]):
    del hub.files[WEIGHTS]
    with pytest.raises(AdapterInvalid, match=WEIGHTS):
        fetched(source(hub))
    hub.files["adapter_model.bin"] = b"pickle"
    with pytest.raises(PickleRefused):
        fetched(source(hub))


@pytest.mark.parametrize(
    "text",
    [
        "hf://other/sql",
        "hf://team",
        "hf://team/sql/deep",
        "hf://team/sql@../x",
        "hf://te am/x",
        "hf://team/sql?x",
        "hf://",
    ],
)
def test_what_is_not_allowed(hub: Hub, text: str):
    with pytest.raises(SourceRefused):
        source(hub, text)
    assert hub.seen == []


def test_one_repository_alone_may_be_allowed(hub: Hub):
    assert source(hub, "hf://team/sql@v1.0", allowed="team/sql").shown == "hf://team/sql@v1.0"
    with pytest.raises(SourceRefused, match="--allow-hub team/other"):
        source(hub, "hf://team/other", allowed="team/sql")
    with pytest.raises(SourceRefused, match="neither owner/name"):
        AllowList(repositories=["*"])


def slow_transfer(hub: Hub, store: AdapterStore, **limits: Any) -> tuple[Transfer, Callable[[], None]]:
    hub.pause = 0.01  # 100,000 bytes take two seconds
    wanted = source(hub)
    transfer = Transfer("x", wanted.shown, max_weights_bytes=1 << 24, **{"timeout": 60, **limits})

    def fetch() -> None:
        with store.stage() as staging:
            wanted.fetch(staging, transfer)

    return transfer, fetch


def test_a_hub_that_dribbles_is_given_up_when_the_time_is_over(hub: Hub, store: AdapterStore):
    """Its every packet comes in time; all of them together do not."""
    transfer, fetch = slow_transfer(hub, store, timeout=0.6)
    with pytest.raises(SourceFailed, match=r"could not be fetched within 0\.6 s .* bytes had come"):
        fetch()
    assert 0 < transfer.bytes_done < 100_000


def test_a_hub_that_dribbles_is_left_when_the_transfer_is_stopped(hub: Hub, store: AdapterStore):
    transfer, fetch = slow_transfer(hub, store)
    with ThreadPoolExecutor(1) as thread:
        fetching = thread.submit(fetch)
        while transfer.bytes_done < 1000:
            time.sleep(0.005)
        transfer.stop()
        with pytest.raises(SourceFailed, match="was stopped"):
            fetching.result()
    assert transfer.bytes_done < 100_000


def test_a_hub_that_falls_silent_is_not_waited_for_beyond_the_time(hub: Hub, store: AdapterStore):
    _, fetch = slow_transfer(hub, store, timeout=0.5)
    hub.pause = 20.0
    with pytest.raises(SourceUnavailable, match="ReadTimeout"):
        fetch()
