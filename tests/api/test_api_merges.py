"""Merging by request and by traffic, over a real socket."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest
from live import LiveServer, assert_error
from test_api_completions import complete

from loraplex.config import Settings

ASK = {"prompt": "the quick brown", "max_tokens": 8, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def merging(make_settings: Callable[..., Settings], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with LiveServer(make_settings(tmp_path_factory.mktemp("data"), merge="manual")) as server:
        yield server


def merged_tokens(client: httpx2.Client, model: str) -> tuple[str, str | None]:
    reply = client.post("/v1/completions", json={**ASK, "model": model})
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["text"], reply.headers.get("x-loraplex-merged-tokens")


def test_merge_use_unmerge(merging: LiveServer):
    client = merging.client
    plain, count = merged_tokens(client, "red")
    assert count == "0"
    base = merged_tokens(client, merging.service.base_name)
    assert base[1] is None, "the base has nothing to merge"
    reply = client.post("/v1/adapters/red/merge")
    assert reply.status_code == 200, reply.text
    merged = reply.json()
    assert merged["id"] == "red@1"
    assert (merged["state"], merged["automatic"], merged["failure"]) == ("ready", False, None)
    assert merged["bytes"] > 0
    assert 0 <= merged["relative_error"] < 1e-4
    assert merged_tokens(client, "red@1") == (plain, "8"), "float32: the same greedy text"
    assert merged_tokens(client, "blue")[1] == "0"
    assert merged_tokens(client, merging.service.base_name) == base
    shown = client.get("/v1/adapters/red").json()["merge"]
    assert (shown["state"], shown["steps"]) == ("ready", 8)
    assert client.get("/v1/adapters/blue").json()["merge"] is None
    metrics = client.get("/metrics").text
    assert f"loraplex_merged_bytes {float(merged['bytes'])}" in metrics
    assert 'loraplex_merged_steps_total{model_name="base"} 8.0' in metrics
    assert client.get("/version").json()["merge"] == "manual"
    assert client.get("/version").json()["batch_invariant"] is False
    gone = client.post("/v1/adapters/red/unmerge")
    assert gone.json()["state"] == "unmerged"
    assert merged_tokens(client, "red") == (plain, "0")
    assert_error(client.post("/v1/adapters/red/unmerge"), 400, "invalid_request", "not merged")
    assert_error(client.post("/v1/adapters/none/merge"), 404, "model_not_found", "none")


def test_deleting_what_is_merged(merging: LiveServer, adapter_folders: dict[str, Path]):
    client = merging.client
    folder = adapter_folders["green"]
    files = {
        "config": (folder / "adapter_config.json").read_bytes(),
        "weights": (folder / "adapter_model.safetensors").read_bytes(),
    }
    assert client.post("/v1/adapters", data={"name": "green"}, files=files).status_code == 201
    assert client.post("/v1/adapters/green/merge").status_code == 200
    assert merged_tokens(client, "green")[1] == "8"
    assert client.delete("/v1/adapters/green").status_code == 200
    assert merging.stats.merges == ()


def test_no_room(merging: LiveServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("loraplex.engine.adapter_merges.available_memory", lambda device: 4 << 10)
    assert_error(merging.client.post("/v1/adapters/blue/merge"), 507, "insufficient_memory", "are available on cpu")


def test_a_server_without_merging_says_how(server: LiveServer):
    assert_error(server.client.post("/v1/adapters/red/merge"), 409, "merging_is_off", "--merge manual")
    assert "x-loraplex-merged-tokens" not in server.client.post("/v1/completions", json={**ASK, "model": "red"}).headers


def test_automatic_merging_of_the_only_tenant(make_settings: Callable[..., Settings], tmp_path: Path):
    with LiveServer(make_settings(tmp_path, merge="auto")) as server:
        deadline = time.monotonic() + 120
        while merged_tokens(server.client, "red")[1] != "8":
            assert time.monotonic() < deadline, "it was never merged"
        assert server.client.get("/v1/adapters/red").json()["merge"]["automatic"] is True
        # a neighbour is served at once, on the base's weights
        both = complete(server.client, model="blue", **{**ASK, "max_tokens": 4})
        assert both["choices"][0]["text"]
