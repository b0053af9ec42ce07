"""/v1/adapters: upload, use, versions, deletion, and what survives a restart."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
from folders import parts_of, save_adapter
from live import LiveServer, assert_error
from test_api_completions import text_of


def push(client: httpx2.Client, name: str, folder: Path) -> httpx2.Response:
    return client.post("/v1/adapters", data={"name": name}, files=parts_of(folder))


@pytest.fixture
def cleaned(server: LiveServer):
    """Adapters that a test pushed go when it ends."""
    kept = set(server.service.catalog.names())
    yield
    for name in set(server.service.catalog.names()) - kept:
        assert server.client.delete(f"/v1/adapters/{name}").status_code == 200


pytestmark = pytest.mark.usefixtures("cleaned")


def test_an_upload_is_usable_at_once(client, adapter_folders):
    reply = push(client, "green", adapter_folders["green"])
    assert reply.status_code == 201
    described = reply.json()
    assert re.fullmatch("[0-9a-f]{64}", described.pop("digest"))
    assert described.pop("created") > 1e9
    assert described.pop("bytes") > 1000
    ignored = described.pop("ignored")
    assert "training" in ignored["inference_mode"] or "trainable" in ignored["inference_mode"]
    assert all(ignored.values()), "each with its reason"
    report, proof = described.pop("report"), described.pop("proof")
    assert [row["count"] for row in report["modules"]] == [2, 2, 2]
    assert report["ignored"] == ignored
    assert proof["passed"]
    assert proof["largest_error"] < 1e-5
    assert described == {
        "id": "green@1",
        "object": "adapter",
        "name": "green",
        "version": 1,
        "state": "ready",
        "parent": None,
        "path": ["green@1"],
        "rank": 2,
        "alpha": 8,
        "use_rslora": False,
        "target_modules": ["down_proj", "q_proj", "v_proj"],
        "num_modules": 6,
        "dtype": "F32",
        "files": ["adapter_config.json", "adapter_model.safetensors"],
        "profile": None,
        "source": "upload",
        "quarantine": None,
        "is_new": True,
        "previous": None,
        "notes": [],
    }
    text = text_of(client, model="green", max_tokens=12)
    assert text != text_of(client, model="base", max_tokens=12)
    assert "green" in [card["id"] for card in client.get("/v1/models").json()["data"]]
    detail = client.get("/v1/adapters/green").json()
    assert detail["tier"] == "device"
    assert detail["versions"] == [1]
    assert (detail["report"], detail["proof"]) == (report, proof)
    # The same files again are the same version, and under another name the same digest.
    again = push(client, "green", adapter_folders["green"])
    assert (again.status_code, again.json()["version"]) == (200, 1)
    twin = push(client, "twin", adapter_folders["green"]).json()
    assert twin["digest"] == detail["digest"]
    assert text_of(client, model="twin", max_tokens=12) == text


def test_versions_can_be_pinned_and_deleted(client, adapter_folders):
    push(client, "v", adapter_folders["green"])
    first = text_of(client, model="v", max_tokens=12)
    second = push(client, "v", adapter_folders["grey"])
    assert (second.status_code, second.json()["id"], second.json()["previous"]) == (201, "v@2", "v@1")
    newest = text_of(client, model="v", max_tokens=12)
    assert newest != first
    assert text_of(client, model="v@1", max_tokens=12) == first
    assert client.get("/v1/adapters/v").json()["versions"] == [2, 1]
    assert client.delete("/v1/adapters/v@2").json() == {"name": "v", "deleted": ["v@2"], "current": "v@1"}
    assert text_of(client, model="v", max_tokens=12) == first
    gone = client.post("/v1/completions", json={"model": "v@2", "prompt": "a"})
    assert_error(gone, 404, "model_not_found", "no version 2", param="model")
    assert client.delete("/v1/adapters/v").json()["deleted"] == ["v@1"]
    assert_error(client.delete("/v1/adapters/v"), 404, "model_not_found", "deleted")
    # Numbers are never given out twice.
    assert push(client, "v", adapter_folders["grey"]).json()["id"] == "v@3"


@pytest.mark.parametrize(
    "order", [("name", "weights", "config"), ("weights", "config", "name"), ("config", "name", "weights")]
)
def test_parts_come_in_any_order(client, adapter_folders, order):
    parts = {"name": (None, b"ordered"), **parts_of(adapter_folders["green"])}
    reply = client.post("/v1/adapters", files=[(part, parts[part]) for part in order])
    assert reply.status_code in (200, 201), reply.text
    assert reply.json()["name"] == "ordered"


def test_a_body_in_chunks_as_curl_sends_it(client, adapter_folders):
    """Boundary and headers as curl writes them, cut into small pieces, without a content-length."""
    mark = b"------------------------d74496d66958873e"
    body = b'--%s\r\nContent-Disposition: form-data; name="name"\r\n\r\ncurled\r\n' % mark
    for part, (file, data) in parts_of(adapter_folders["green"]).items():
        body += b'--%s\r\nContent-Disposition: form-data; name="%s"; filename="%s"\r\n' % (
            mark,
            part.encode(),
            file.encode(),
        )
        body += b"Content-Type: application/octet-stream\r\n\r\n" + data + b"\r\n"
    body += b"--%s--\r\n" % mark
    headers = {"content-type": f"multipart/form-data; boundary={mark.decode()}"}
    pieces = (body[i : i + 1000] for i in range(0, len(body), 1000))
    reply = client.post("/v1/adapters", content=pieces, headers=headers)
    assert reply.status_code == 201, reply.text


def test_the_same_name_from_two_sides_at_once(client, adapter_folders):
    folders = [adapter_folders["green"], adapter_folders["grey"]] * 4
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda folder: push(client, "race", folder), folders))
    assert sorted(reply.status_code for reply in replies) == [200] * 6 + [201] * 2
    created = sorted(reply.json()["version"] for reply in replies if reply.status_code == 201)
    assert created == [1, 2]  # every number once
    assert client.get("/v1/adapters/race").json()["versions"] == [2, 1]


def test_the_list(client, adapter_folders):
    push(client, "zoe", adapter_folders["green"])
    page = client.get("/v1/adapters").json()
    assert [row["name"] for row in page["data"]] == ["blue", "red", "zoe"]
    assert page["total"] == 3
    assert {row["tier"] for row in page["data"]} <= {"disk", "ram", "device"}
    assert [row["name"] for row in client.get("/v1/adapters?offset=1&limit=1").json()["data"]] == ["red"]
    assert_error(client.get("/v1/adapters?limit=0"), 400, "invalid_request", "limit", param="limit")
    assert_error(client.get("/v1/adapters?offset=x"), 400, "invalid_request", "offset", param="offset")


@pytest.mark.parametrize("name", ["base"])
def test_the_name_of_the_base_is_taken(client, adapter_folders, name):
    assert_error(push(client, name, adapter_folders["green"]), 409, "adapter_conflict", "base model", param="name")
    assert_error(client.delete("/v1/adapters/base"), 400, "invalid_request", "base model")


def test_deletion_does_not_break_a_running_request(server, client, adapter_folders):
    push(client, "shortlived", adapter_folders["green"])
    expected = text_of(client, model="shortlived", max_tokens=30)
    client.delete("/v1/adapters/shortlived")
    push(client, "shortlived", adapter_folders["green"])
    with ThreadPoolExecutor() as pool:
        with server.paused():
            # One is running, one waits behind it; neither has its adapter in RAM for good.
            answers = [pool.submit(text_of, client, model="shortlived", max_tokens=30) for _ in range(2)]
            server.wait_until(lambda: server.service.num_running == 2, "queueing two requests")
            server.wait_until_computing()
            deletion = pool.submit(client.delete, "/v1/adapters/shortlived")
            server.wait_until(lambda: "shortlived" not in server.service.catalog.names(), "the deletion")
        assert deletion.result().status_code == 200
        assert [answer.result() for answer in answers] == [expected] * 2
    gone = client.post("/v1/completions", json={"model": "shortlived", "prompt": "a"})
    assert_error(gone, 404, "model_not_found", "deleted")


def test_an_adapter_deleted_while_a_request_resolves_it_is_not_found(server, client, adapter_folders, monkeypatch):
    push(client, "fleeting", adapter_folders["green"])
    catalog = server.service.catalog
    hold = catalog.hold

    def delete_first(digest):
        if "fleeting" in catalog.names():
            catalog.delete("fleeting", who="test")
            catalog.sweep()
        return hold(digest)

    monkeypatch.setattr(catalog, "hold", delete_first)
    reply = client.post("/v1/completions", json={"model": "fleeting", "prompt": "a"})
    assert_error(reply, 404, "model_not_found", "deleted")


def test_what_was_accepted_is_there_after_a_restart(make_settings, adapter_folders, base_folder, tmp_path):
    settings = make_settings(tmp_path / "data")
    with LiveServer(settings) as server:
        push(server.client, "green", adapter_folders["green"])
        push(server.client, "red", adapter_folders["grey"])  # newer than the one of the operator's folder
        texts = {name: text_of(server.client, model=name, max_tokens=12) for name in ("green", "red", "red@1", "blue")}
        server.check_at_rest()
    (tmp_path / "data" / "staging" / "left").mkdir()
    with LiveServer(settings) as server:
        assert {name: text_of(server.client, model=name, max_tokens=12) for name in texts} == texts
        assert server.client.get("/v1/adapters/red").json()["versions"] == [2, 1]
        assert push(server.client, "green", adapter_folders["green"]).status_code == 200
        server.check_at_rest()


def test_adapters_of_another_base_are_not_served(make_settings, base_folder, adapter_folders, tmp_path):
    with LiveServer(make_settings(tmp_path / "data")) as server:
        push(server.client, "green", adapter_folders["green"])
    other = tmp_path / "base"
    other.mkdir()
    for file in base_folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    from safetensors.torch import load_file, save_file

    tensors = load_file(other / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"] * 1.5
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with LiveServer(make_settings(tmp_path / "data", model=other, adapters=None)) as server:
        assert [card["id"] for card in server.client.get("/v1/models").json()["data"]] == ["base"]
        assert {row["state"] for row in server.client.get("/v1/adapters").json()["data"]} == {"incompatible"}
        detail = server.client.get("/v1/adapters/green").json()
        assert (detail["id"], detail["state"], detail["current"]) == ("green@1", "incompatible", None)
        assert_error(server.client.delete("/v1/adapters/green"), 404, "adapter_incompatible", "another base model")
        reply = server.client.post("/v1/completions", json={"model": "green", "prompt": "a"})
        assert_error(reply, 404, "adapter_incompatible", "another base model", "Push the adapter again")
        assert push(server.client, "green", adapter_folders["green"]).json()["id"] == "green@2"
        assert text_of(server.client, model="green", max_tokens=2) is not None
        detail = server.client.get("/v1/adapters/green").json()
        assert (detail["current"], detail["versions"], detail["incompatible"]) == (2, [2, 1], [1])
        assert server.client.delete("/v1/adapters/blue@1").json()["deleted"] == ["blue@1"]
        server.service.catalog.check_integrity()
    with LiveServer(make_settings(tmp_path / "data", adapters=None)) as server:
        # Back on the first base its versions are what they were, and the other's are listed.
        assert server.client.get("/v1/adapters/green").json()["current"] == 1
        assert text_of(server.client, model="green", max_tokens=2) is not None
        assert_error(server.client.get("/v1/adapters/blue"), 404, "model_not_found", "deleted")
        server.check_at_rest()


def test_a_folder_that_does_not_fit_is_refused_at_start_by_name(make_settings, base_folder, tmp_path):
    from loraplex.errors import StartupError

    save_adapter(base_folder, tmp_path / "served" / "wide", r=32)
    with pytest.raises(StartupError, match="'wide' in .*rank 32"):
        LiveServer(make_settings(tmp_path / "data", adapters=tmp_path / "served")).__enter__()
    (tmp_path / "served" / "wide").rename(tmp_path / "served" / "no name")
    with pytest.raises(StartupError, match="'no name'"):
        LiveServer(make_settings(tmp_path / "data", adapters=tmp_path / "served")).__enter__()
