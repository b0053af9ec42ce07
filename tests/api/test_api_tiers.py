"""Pins, prefetches, idle adapters and the view of the tiers, over a real socket."""

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest
from folders import save_adapter
from live import LiveServer, assert_error
from test_api_adapters import push
from test_api_completions import text_of

from loraplex.config import Settings


@pytest.fixture(scope="module")
def nbytes(make_settings: Callable[..., Settings], tmp_path_factory: pytest.TempPathFactory) -> int:
    """What `blue`, the largest, has in RAM."""
    with LiveServer(make_settings(tmp_path_factory.mktemp("data"))) as server:
        return server.client.post("/v1/adapters/blue/prefetch").json()["ram_bytes"]


@pytest.fixture
def small(make_settings: Callable[..., Settings], tmp_path: Path, nbytes: int) -> Iterator[LiveServer]:
    """RAM for two adapters as large as the largest."""
    with LiveServer(make_settings(tmp_path / "data", adapter_cache_bytes=2 * nbytes, proof="off")) as server:
        yield server
        server.check_at_rest()


def standing(client: httpx2.Client, model: str) -> dict:
    return client.get(f"/v1/adapters/{model}").json()


def use(client: httpx2.Client, model: str) -> None:
    text_of(client, model=model, max_tokens=2)


def test_a_pin_keeps_an_adapter_in_ram(small: LiveServer, adapter_folders: dict[str, Path], base_folder, tmp_path):
    client = small.client
    reply = client.post("/v1/adapters/red/pin").json()
    assert (reply["id"], reply["pinned"], reply["tier"]) == ("red@1", True, "ram")
    assert client.post("/v1/adapters/red/pin").status_code == 200, "again is the same"
    folder = save_adapter(base_folder, tmp_path / "other", seed=9, r=8, target_modules=["q_proj", "up_proj"])
    push(client, "other", folder)
    use(client, "blue")
    use(client, "other")
    use(client, "blue")
    assert standing(client, "red")["pinned"]
    assert standing(client, "red")["tier"] == "ram"
    gone = standing(client, "other")
    assert (gone["tier"], gone["evicted"]["why"]) == ("disk", "room")
    assert gone["evicted"]["for"] == standing(client, "blue")["digest"]
    assert standing(client, "blue")["hits"] == 2
    assert standing(client, "blue")["loads"] == 2
    assert_error(client.post("/v1/adapters/other/unpin"), 400, "invalid_request", "'other' is not pinned")
    assert client.post("/v1/adapters/red/unpin").json()["unpinned"] == ["red"]
    assert not standing(client, "red")["pinned"]
    use(client, "other")
    assert standing(client, "red")["tier"] == "disk"


def test_what_could_not_be_served_beside_the_pinned_is_refused_at_upload(
    make_settings, tmp_path: Path, nbytes: int, base_folder: Path
):
    big = save_adapter(base_folder, tmp_path / "big", seed=9, r=16, target_modules=["q_proj", "up_proj"])
    with LiveServer(make_settings(tmp_path / "data", adapter_cache_bytes=2 * nbytes + nbytes // 2)) as server:
        client = server.client
        assert client.post("/v1/adapters/blue/pin").status_code == 200
        assert_error(push(client, "big", big), 413, "request_too_large", "beside the pinned", "--adapter-cache-bytes")
        assert client.post("/v1/adapters/blue/unpin").status_code == 200
        assert push(client, "big", big).status_code == 201
        server.check_at_rest()


def test_the_last_pin_leaves_room_for_the_largest_other(make_settings, tmp_path: Path, nbytes: int):
    with LiveServer(make_settings(tmp_path, adapter_cache_bytes=nbytes + nbytes // 2, proof="off")) as server:
        error = assert_error(server.client.post("/v1/adapters/red/pin"), 507, "insufficient_memory", "would leave")
        assert str(nbytes) in error["message"], "what the largest of the others needs"
        assert "pinned" not in error["message"], "nothing else is"
        assert "Start the server with --adapter-cache-bytes" in error["message"]
        assert server.client.get("/v1/tiers").json()["ram"]["pinned"] == 0
        use(server.client, "blue")
        server.check_at_rest()


def test_a_pin_follows_its_name_and_survives_a_restart(make_settings, adapter_folders, tmp_path: Path):
    settings = make_settings(tmp_path)
    with LiveServer(settings) as server:
        client = server.client
        push(client, "draft", adapter_folders["green"])
        push(client, "kept", adapter_folders["green"])
        client.post("/v1/adapters/draft/pin")
        client.post("/v1/adapters/kept@1/pin")
        push(client, "draft", adapter_folders["grey"])
        push(client, "kept", adapter_folders["grey"])
        server.wait_until(lambda: standing(client, "draft@2")["pinned"], "pinning draft@2")
        assert standing(client, "kept@1")["pinned"]
        assert_error(client.post("/v1/adapters/draft@2/unpin"), 400, "invalid_request", "'draft' itself is")
        trail = client.get("/v1/adapters/draft/history").json()["data"]
        assert [row["action"] for row in trail] == ["push", "pin", "push"]
    with LiveServer(settings) as server:
        client = server.client
        server.wait_until(lambda: server.client.get("/v1/tiers").json()["ram"]["pinned"] == 2, "pinning again")
        assert standing(client, "draft")["hits"] == 0
        assert client.delete("/v1/adapters/draft").status_code == 200
        assert client.delete("/v1/adapters/kept").status_code == 200
        server.wait_until(lambda: not server.service.catalog.registry.pins.list(), "forgetting the pins")
        assert server.client.get("/v1/tiers").json()["ram"]["pinned"] == 0


def test_prefetch(small: LiveServer):
    client = small.client
    assert standing(client, "red")["tier"] == "disk"
    assert client.post("/v1/adapters/red/prefetch").json()["tier"] == "ram"
    there = client.post("/v1/adapters/red@1/prefetch", json={"to": "device"}).json()
    assert (there["tier"], there["hits"], there["loads"]) == ("device", 0, 1)
    loads = small.stats.num_loads
    use(client, "red")
    assert small.stats.num_loads == loads, "the request found it there"
    assert_error(client.post("/v1/adapters/red/prefetch", json={"to": "tape"}), 400, "invalid_request")
    assert_error(client.post("/v1/adapters/none/prefetch"), 404, "model_not_found")


def test_a_prefetch_of_damaged_files_says_so(small: LiveServer):
    weights = small.service.catalog.store.path(standing(small.client, "blue")["digest"]) / "adapter_model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert_error(small.client.post("/v1/adapters/blue/prefetch"), 500, "adapter_load_failed")
    weights.write_bytes(good)
    assert small.client.post("/v1/adapters/blue/prefetch").status_code == 200


def test_idle_adapters_leave(make_settings, tmp_path: Path):
    with LiveServer(make_settings(tmp_path, adapter_ttl=0.2)) as server:
        client = server.client
        client.post("/v1/adapters/blue/pin")
        use(client, "red")
        server.wait_until(lambda: standing(client, "red")["tier"] == "disk", "letting red go")
        assert standing(client, "red")["evicted"]["why"] == "idle"
        assert standing(client, "blue")["tier"] == "ram"
        use(client, "red")


def test_the_view(small: LiveServer):
    client = small.client
    use(client, "red")
    view = client.get("/v1/tiers").json()
    assert [row["id"] for row in view["data"]] == ["blue@1", "red@1"]
    red = view["data"][1]
    assert (red["tier"], red["hits"], red["leases"], red["pinned"], red["evicted"]) == ("device", 1, 0, False, None)
    assert 0 <= red["last_use"] < 60
    assert view["ram"]["bytes"] == red["ram_bytes"] > 0
    assert view["ram"]["budget"] == small.engine.cache.maxsize
    assert view["device"] | {"bytes": 0} == {"places": 4, "used": 1, "bytes": 0}
    assert [row["id"] for row in client.get("/v1/tiers?tier=device").json()["data"]] == ["red@1"]
    assert [row["id"] for row in client.get("/v1/tiers?tier=ram").json()["data"]] == ["red@1"]
    assert [row["id"] for row in client.get("/v1/tiers?tier=disk").json()["data"]] == ["blue@1"]
    page = client.get("/v1/tiers?offset=1&limit=1").json()
    assert ([row["id"] for row in page["data"]], page["total"]) == (["red@1"], 2)
    assert_error(client.get("/v1/tiers?tier=tape"), 400, "invalid_request")
