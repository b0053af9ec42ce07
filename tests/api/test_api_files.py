"""Taking out: the files of a version, over a real socket."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from live import LiveServer, assert_error
from test_api_adapters import push

from loraplex.lora.digest import adapter_digest


@pytest.fixture
def pushed(server: LiveServer, adapter_folders: dict[str, Path]) -> Iterator[dict]:
    yield push(server.client, "taken", adapter_folders["green"]).json()
    server.client.delete("/v1/adapters/taken")


def fetch(client: httpx2.Client, model: str, part: str) -> httpx2.Response:
    return client.get(f"/v1/adapters/{model}/files/{part}")


def test_what_comes_out_is_what_went_in(server: LiveServer, pushed: dict, adapter_folders: dict[str, Path]):
    folder = adapter_folders["green"]
    sums = {}
    for part, name in (("config", "adapter_config.json"), ("weights", "adapter_model.safetensors")):
        reply = fetch(server.client, "taken", part)
        assert reply.status_code == 200
        assert reply.content == (folder / name).read_bytes()
        assert reply.headers["x-loraplex-digest"] == pushed["digest"]
        assert reply.headers["x-loraplex-adapter"] == pushed["id"]
        assert name in reply.headers["content-disposition"]
        sums[part] = hashlib.sha256(reply.content).digest()
    assert adapter_digest(sums["config"], sums["weights"]) == pushed["digest"]
    assert fetch(server.client, pushed["id"], "config").content == (folder / "adapter_config.json").read_bytes()


def test_a_part_of_a_file(server: LiveServer, pushed: dict, adapter_folders: dict[str, Path]):
    """For downloads that go on where they broke off."""
    whole = (adapter_folders["green"] / "adapter_model.safetensors").read_bytes()
    reply = server.client.get("/v1/adapters/taken/files/weights", headers={"range": "bytes=100-"})
    assert (reply.status_code, reply.content) == (206, whole[100:])


def test_what_there_is_not(server: LiveServer, pushed: dict):
    assert_error(fetch(server.client, "nobody", "config"), 404, "model_not_found")
    assert_error(fetch(server.client, "taken@77", "config"), 404, "model_not_found")
    assert_error(fetch(server.client, "taken", "chat_template"), 400, "invalid_request", "config, weights")
    assert_error(fetch(server.client, "taken", "registry.sqlite"), 400, "invalid_request")
    assert fetch(server.client, "taken", "..%2F..%2Fregistry.sqlite").status_code == 404


def test_files_that_the_disk_has_changed_are_not_given_out(server: LiveServer, pushed: dict):
    weights = server.service.catalog.store.path(pushed["digest"]) / "adapter_model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert_error(fetch(server.client, "taken", "config"), 500, "adapter_load_failed", pushed["id"], "Push")
    weights.unlink()
    assert_error(fetch(server.client, "taken", "config"), 500, "adapter_load_failed", "cannot be read")
    weights.write_bytes(good)
    assert fetch(server.client, "taken", "weights").content == good


def test_a_deletion_waits_for_a_download(server: LiveServer, pushed: dict, adapter_folders: dict[str, Path]):
    """The files of a download under way stay until it ends."""
    store = server.service.catalog.store
    with store.hold(pushed["digest"]) as folder:  # as the route does it
        assert server.client.delete("/v1/adapters/taken").status_code == 200
        assert (folder / "adapter_config.json").is_file()
    server.service.catalog.sweep()
    assert not folder.exists()
