"""Adapters that the server fetches: by JSON, by vLLM's dialect."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest
import stamina
from folders import save_adapter
from live import LiveServer, assert_error
from test_api_completions import text_of

from hub_server import WEIGHTS, running_hub
from loraplex.config import Settings


@pytest.fixture(scope="module")
def root(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("root")
    save_adapter(base_folder, root / "one", seed=11, r=2)
    save_adapter(base_folder, root / "two", seed=12, r=2)
    (root / "bad").mkdir()
    shutil.copy(root / "one" / "adapter_config.json", root / "bad")
    (root / "bad" / "adapter_model.safetensors").write_bytes(b"\x80\x02 pickle")
    return root


@pytest.fixture(scope="module")
def allowing(
    make_settings: Callable[..., Settings], root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    with LiveServer(make_settings(tmp_path_factory.mktemp("data"), allow_adapter_root=[root])) as server:
        yield server
        server.check_at_rest()


def load(server: LiveServer, name: str, path: object, **more: object):
    return server.client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path), **more})


def test_a_name_and_a_source(allowing: LiveServer, root: Path):
    client = allowing.client
    reply = client.post("/v1/adapters", json={"name": "mine", "source": str(root / "one")})
    assert reply.status_code == 201, reply.text
    body = reply.json()
    assert (body["id"], body["source"], body["is_new"], body["proof"]["passed"]) == ("mine@1", "folder:one", True, True)
    assert text_of(client, model="mine", max_tokens=4)
    assert client.post("/v1/adapters", json={"name": "mine", "source": "one"}).status_code == 200
    second = client.post("/v1/adapters", json={"name": "mine", "source": "two"}).json()
    assert (second["id"], second["previous"]) == ("mine@2", "mine@1")
    assert client.get("/v1/transfers").json()["data"] == []
    client.delete("/v1/adapters/mine")


def test_what_is_refused(allowing: LiveServer, root: Path):
    client = allowing.client

    def post(name: str, source: str):
        return client.post("/v1/adapters", json={"name": name, "source": source})

    assert_error(post("x", "/etc"), 403, "source_not_allowed", "--allow-adapter-root")
    assert_error(post("x", "s3://bucket/x"), 403, "source_not_allowed")
    assert_error(post("x", "none"), 404, "source_not_found")
    assert_error(post("x", "bad"), 415, "pickle_refused")
    assert_error(post("base", "one"), 409, "adapter_conflict")
    assert_error(post("a@b", "one"), 400, "invalid_name")
    assert_error(client.post("/v1/adapters", json={"name": "x"}), 400, "invalid_request", "source", "multipart")
    assert_error(client.post("/v1/adapters", json={"name": "x", "source": "one", "y": 1}), 400, "invalid_request")
    huge = client.post("/v1/adapters", json={"name": "x", "source": "y" * (100 << 10)})
    assert_error(huge, 413, "request_too_large")


def test_vllms_dialect(allowing: LiveServer, root: Path):
    client = allowing.client
    reply = load(allowing, "tuned", root / "one", lora_int_id=7)
    assert (reply.status_code, reply.text) == (200, "Success: LoRA adapter 'tuned' added successfully.")
    assert reply.headers["content-type"].startswith("text/plain")
    assert "tuned" in [card["id"] for card in client.get("/v1/models").json()["data"]]
    assert_error(load(allowing, "tuned", root / "two"), 400, "invalid_request", "already been loaded")
    assert load(allowing, "tuned", root / "two", load_inplace=True).status_code == 200
    assert client.get("/v1/adapters/tuned").json()["version"] == 2
    gone = client.post("/v1/unload_lora_adapter", json={"lora_name": "tuned"})
    assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'tuned' removed successfully.")
    assert_error(client.post("/v1/unload_lora_adapter", json={"lora_name": "tuned"}), 404, "model_not_found")
    assert_error(load(allowing, "x", "/etc/passwd"), 403, "source_not_allowed")
    assert_error(client.post("/v1/load_lora_adapter", json={"lora_name": "x"}), 400, "invalid_request")


def test_a_server_without_roots_reads_nothing(server: LiveServer, root: Path):
    assert_error(load(server, "x", root / "one"), 403, "source_not_allowed", "--allow-adapter-root DIR")


def test_a_hub_that_stumbles_is_asked_again(make_settings, root: Path, tmp_path: Path):
    with running_hub() as hub, stamina.set_testing(True, attempts=99, cap=True):  # as many tries, without the waits
        hub.files = {path.name: path.read_bytes() for path in (root / "one").iterdir()}
        settings = make_settings(tmp_path, allow_hub=["team/*"], hub_endpoint=hub.url, hub_token="hf_not-a-secret")
        with LiveServer(settings) as server:
            client = server.client
            hub.answers = [503, 429]
            reply = client.post("/v1/adapters", json={"name": "sql", "source": "hf://team/sql"})
            assert reply.status_code == 201, reply.text
            assert reply.json()["source"].startswith("hf://team/sql@0123")
            assert len(hub.seen) == 5, "two refusals, one description, two files"
            assert text_of(client, model="sql", max_tokens=2)
            hub.answers = [503] * 9
            refused = client.post("/v1/adapters", json={"name": "other", "source": "hf://team/sql"})
            assert_error(refused, 502, "source_failed", "answered 503")
            assert len(hub.answers) == 5, "four tries"
            hub.answers = []
            hub.cut = True
            assert_error(load(server, "other", "hf://team/sql"), 502, "source_failed", "broke off")
            hub.cut = False
            hub.files[WEIGHTS] = b"w" * (5 << 20)
            assert_error(load(server, "other", "hf://team/sql"), 413, "request_too_large", str(5 << 20))
            assert_error(load(server, "other", "hf://else/sql"), 403, "source_not_allowed", "--allow-hub")
            server.check_at_rest()


def test_a_client_that_leaves_takes_its_transfer_with_it(make_settings, root: Path, tmp_path: Path):
    """And with it the place of the next: two are fetched at once."""
    with running_hub() as hub:
        hub.files = {path.name: path.read_bytes() for path in (root / "one").iterdir()}
        settings = make_settings(tmp_path, allow_hub=["team/*"], hub_endpoint=hub.url, allow_adapter_root=[root])
        with LiveServer(settings) as server:
            hub.pause = 0.2
            ours = "/v1/adapters", {"name": "a", "source": "hf://team/sql"}
            vllms = "/v1/load_lora_adapter", {"lora_name": "b", "lora_path": "hf://team/sql"}
            for path, body in (ours, vllms):
                with pytest.raises(httpx2.ReadTimeout):
                    server.client.post(path, json=body, timeout=0.5)
            assert load(server, "local", root / "two").status_code == 200
            server.wait_until(lambda: not server.client.get("/v1/transfers").json()["data"], "the threads' end")
            names = {row["name"] for row in server.client.get("/v1/adapters").json()["data"]}
            assert names == {"red", "blue", "local"}
            counted = 'loraplex_uploads_total{result="broken_off"} 2.0'
            server.wait_until(lambda: counted in server.client.get("/metrics").text, "the count of both")
            server.check_at_rest()
