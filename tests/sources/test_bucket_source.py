"""Buckets, from a real server that speaks S3 on loopback."""

import os
from collections.abc import Callable, Iterator

import httpx2
import pytest

from loraplex.errors import (
    AdapterInvalid,
    AdapterTooLarge,
    PickleRefused,
    SourceFailed,
    SourceNotFound,
    SourceRefused,
    SourceUnavailable,
)
from loraplex.sources.allow_list import AllowList
from loraplex.sources.source import Source

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FILES = {CONFIG: b"{}", WEIGHTS: os.urandom(3 << 20), "chat_template.jinja": b"{{ messages }}"}
KEY, SECRET = "AKIAEXAMPLE", "not-a-secret-but-secret"


@pytest.fixture(scope="module")
def s3() -> Iterator[httpx2.Client]:
    """A client of the server; the environment points obstore at it."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch, httpx2.Client(base_url=f"http://{host}:{port}") as client:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", KEY)
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("AWS_REGION", "us-east-1")
        assert client.put("/adapters").status_code == 200
        for name, data in FILES.items():
            assert client.put(f"/adapters/team/sql/{name}", content=data).status_code == 200
        yield client
    server.stop()


def source(address: str) -> Source:
    return AllowList(buckets=["s3://adapters/team"]).source(address)


def test_an_adapter_below_a_prefix(s3: httpx2.Client, fetched: Callable[..., dict[str, bytes]]):
    s3.put("/adapters/team/sql/optimizer.pt", content=b"left alone")
    assert fetched(source("s3://adapters/team/sql")) == FILES
    assert fetched(source("s3://adapters/team/sql/")) == FILES
    assert source("s3://adapters/team/sql/").shown == "s3://adapters/team/sql"


def test_what_is_not_there(s3: httpx2.Client, fetched: Callable[..., dict[str, bytes]]):
    with pytest.raises(SourceNotFound, match="no adapter at s3://adapters/team/nothing"):
        fetched(source("s3://adapters/team/nothing"))
    s3.put(f"/adapters/team/half/{CONFIG}", content=b"{}")
    with pytest.raises(AdapterInvalid, match=WEIGHTS):
        fetched(source("s3://adapters/team/half"))
    s3.put("/adapters/team/half/adapter_model.bin", content=b"pickle")
    with pytest.raises(PickleRefused):
        fetched(source("s3://adapters/team/half"))


def test_too_large_is_known_before_the_first_byte(s3: httpx2.Client, fetched: Callable[..., dict[str, bytes]]):
    with pytest.raises(AdapterTooLarge, match=str(3 << 20)):
        fetched(source("s3://adapters/team/sql"), max_weights_bytes=1 << 20)


def test_a_store_that_is_away_is_worth_another_try_and_no_secret_shows(
    s3: httpx2.Client, fetched: Callable[..., dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(SourceUnavailable) as failed:
        fetched(source("s3://adapters/team/sql"))
    assert KEY not in str(failed.value)
    assert SECRET not in str(failed.value)
    assert failed.value.__cause__ is None


def test_obstore_is_optional(monkeypatch: pytest.MonkeyPatch, fetched: Callable[..., dict[str, bytes]]):
    monkeypatch.setitem(__import__("sys").modules, "obstore.store", None)
    with pytest.raises(SourceFailed, match=r"loraplex\[s3\]"):
        fetched(source("s3://adapters/team/sql"))


@pytest.mark.parametrize(
    "address",
    [
        "s3://adapters",
        "s3://adapters/teams/sql",
        "s3://adapters/team/../private",
        "s3://other/team/sql",
        "gs://adapters/team/sql",
        "s3://user:pass@adapters/team",
        "s3://adapters/team?x=1",
        "s3://adapters/team/%2e%2e/private",
        "s3://adapters/team//sql",
        "s3a://adapters/team/sql",
        "memory:///",
        "http://adapters/team/sql",
        "s3://",
    ],
)
def test_what_is_not_allowed(address: str):
    with pytest.raises(SourceRefused) as refused:
        source(address)
    assert "pass@" not in str(refused.value)
