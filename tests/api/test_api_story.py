"""Stories over real sockets, with servers that are processes: versions that come and go under load, and two servers on
one store and registry."""

import hashlib
import json
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx2
import pytest
from folders import parts_of, peft_greedy, save_adapter, save_base
from live import LiveServer, assert_error
from processes import ServerProcess, servers

from forks import Forks
from loraplex.errors import StartupError, StorageFull

CONTEXT = 2048
LONG = 1500
IN_MEMORY = {"tier", "ram_bytes", "leases", "pinned", "hits", "loads", "last_use", "evicted", "merge"}
INCOMPLETE = "\ufffd"
PREFIX = [7 + (11 * number) % 300 for number in range(500)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("long") / "base", context=CONTEXT)


@pytest.fixture(scope="module")
def adapters(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("versions")
    return [save_adapter(model, root / str(seed), seed=seed, r=2) for seed in (1, 2)]


def push(client: httpx2.Client, name: str, folder: Path, alpha: float | None = None) -> httpx2.Response:
    """`alpha`: another lora_alpha, so that the same weights are another adapter."""
    parts: dict[str, Any] = parts_of(folder)
    if alpha is not None:
        config = json.loads((folder / "adapter_config.json").read_text()) | {"lora_alpha": alpha}
        parts["config"] = ("adapter_config.json", json.dumps(config).encode())
    return client.post("/v1/adapters", data={"name": name}, files=parts)


def complete(client: httpx2.Client, model: str, prompt: list[int], max_tokens: int = 8) -> dict[str, Any]:
    body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    reply = client.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def said(client: httpx2.Client, model: str, prompt: list[int], max_tokens: int = 8) -> tuple[str, str]:
    """Which version answered, and what; without the last character while it lacks bytes."""
    reply = complete(client, model, prompt, max_tokens)
    return reply["model"], reply["choices"][0]["text"].rstrip(INCOMPLETE)


@contextmanager
def streaming(client: httpx2.Client, model: str, max_tokens: int = LONG) -> Iterator[Callable[[], tuple[str, str]]]:
    """A stream that has begun. Call what it gives for the rest: which version answered, and the whole text."""
    body = {"model": model, "prompt": PREFIX, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as reply:
        lines = (line.removeprefix("data: ") for line in reply.iter_lines() if line)
        chunks = [json.loads(next(lines))]

        def rest() -> tuple[str, str]:
            chunks.extend(json.loads(line) for line in lines if line != "[DONE]")
            assert all("choices" in chunk for chunk in chunks), chunks[-1]
            (name,) = {chunk["model"] for chunk in chunks}
            return name, "".join(chunk["choices"][0]["text"] for chunk in chunks).rstrip(INCOMPLETE)

        yield rest


def is_running(client: httpx2.Client) -> bool:
    found = re.search(r"^vllm:num_requests_running\S* (\S+)$", client.get("/metrics").text, re.MULTILINE)
    assert found is not None
    return float(found[1]) > 0


def state_of(client: httpx2.Client) -> dict[str, Any]:
    """All that the server says of adapters, but for where they are in memory and how they got there."""
    rows = client.get("/v1/adapters").json()["data"]
    details = [client.get(f"/v1/adapters/{row['name']}").json() for row in rows]
    for row in rows + details:
        for passing in IN_MEMORY & row.keys():
            del row[passing]
    models = [card["id"] for card in client.get("/v1/models").json()["data"]]
    return {"rows": rows, "details": details, "models": models, "audit": client.get("/v1/audit").json()}


def test_the_life_of_a_name(forks: Forks, model: Path, adapters: list[Path], tmp_path: Path, tokenizer):
    expected = [tokenizer.decode(peft_greedy(model, folder, PREFIX, 8)).rstrip(INCOMPLETE) for folder in adapters]
    assert expected[0] != expected[1]
    data = tmp_path / "data"
    with servers(forks, 1, model, data) as (server,):
        client = server.client
        assert push(client, "story", adapters[0]).json()["id"] == "story@1"
        assert said(client, "story", PREFIX) == ("story@1", expected[0])
        whole = said(client, "story", PREFIX, LONG)

        # Version 2 comes while version 1 streams; both answer as themselves.
        with streaming(client, "story") as rest:
            pushed = push(client, "story", adapters[1])
            assert (pushed.status_code, pushed.json()["previous"]) == (201, "story@1")
            assert said(client, "story", PREFIX) == ("story@2", expected[1])
            assert said(client, "story@1", PREFIX) == ("story@1", expected[0])
            assert is_running(client), "version 1 still streams"
            assert rest() == whole

        # The two versions have the same 500 tokens in front and share no block of them.
        prompt = PREFIX[::-1]
        cached = [
            complete(client, name, prompt)["usage"]["prompt_tokens_details"]["cached_tokens"]
            for name in ("story@1", "story@2", "base") * 2
        ]
        assert cached[:3] == [0, 0, 0]
        assert min(cached[3:]) >= 480

        # Back to the first, by one call.
        back = client.post("/v1/adapters/story/rollback").json()
        assert (back["id"], back["previous"]) == ("story@1", "story@2")
        assert said(client, "story", PREFIX) == ("story@1", expected[0])

        # Deletion in the middle of a stream.
        push(client, "gone", adapters[1])
        with streaming(client, "gone") as rest:
            assert client.delete("/v1/adapters/gone").json() == {"name": "gone", "deleted": ["gone@1"], "current": None}
            assert client.post("/v1/completions", json={"model": "gone", "prompt": "a"}).status_code == 404
            assert is_running(client), "it still streams"
            name, text = rest()
        assert name == "gone@1"
        assert text.startswith(expected[1])

        state = state_of(client)
        told = [(event["action"], event["name"], event["version"]) for event in reversed(state["audit"]["data"])]
        assert told == [
            ("push", "story", 1),
            ("push", "story", 2),
            ("rollback", "story", 1),
            ("push", "gone", 1),
            ("delete", "gone", 1),
        ]
        assert server.end(signal.SIGKILL) == -signal.SIGKILL

    # Started again: the same state, the same answers.
    with servers(forks, 1, model, data) as (server,):
        assert state_of(server.client) == state
        assert said(server.client, "story", PREFIX) == ("story@1", expected[0])
        assert said(server.client, "story@2", PREFIX) == ("story@2", expected[1])
        assert server.end() == 0
    assert not list((data / "staging").iterdir())


def test_two_servers_on_one_store(forks: Forks, model: Path, adapters: list[Path], tmp_path: Path, registry_url: str):
    data = tmp_path / "data"
    with servers(forks, 2, model, data, registry_url=registry_url) as (one, other):
        # What one accepts the other serves at once.
        assert push(one.client, "shared", adapters[0]).json()["id"] == "shared@1"
        first = said(other.client, "shared", PREFIX)
        assert first[0] == "shared@1"
        assert push(other.client, "shared", adapters[1]).json()["id"] == "shared@2"
        second = said(one.client, "shared", PREFIX)
        assert (second[0], second[1] != first[1]) == ("shared@2", True)
        assert push(one.client, "shared", adapters[1]).status_code == 200
        one.client.post("/v1/adapters/shared/rollback")
        assert said(other.client, "shared", PREFIX) == first

        # Both take uploads of one name at once: every number once, and none is lost.
        with ThreadPoolExecutor(6) as pool:
            clients = [one.client, other.client] * 5
            pushed = list(pool.map(lambda at: push(clients[at], "race", adapters[0], 10 + at), range(10)))
        assert [reply.status_code for reply in pushed] == [201] * 10
        assert sorted(reply.json()["version"] for reply in pushed) == list(range(1, 11))
        assert one.client.get("/v1/adapters/race").json()["versions"] == list(range(10, 0, -1))
        assert {reply.json()["digest"] for reply in pushed} <= {path.name for path in (data / "blobs").iterdir()}

        # One deletes, and sweeps, what the other is answering with.
        text = said(other.client, "race@5", PREFIX, LONG)[1]
        with streaming(other.client, "race@5") as rest:
            assert len(one.client.delete("/v1/adapters/race").json()["deleted"]) == 10
            refused = other.client.post("/v1/completions", json={"model": "race@5", "prompt": "a"})
            assert refused.status_code == 404, "the other knows at once"
            assert is_running(other.client)
            assert rest() == ("race@5", text)

        # One is killed in the middle of an upload; the other goes on and clears up after it.
        with half_an_upload(one):
            assert one.end(signal.SIGKILL) == -signal.SIGKILL
        (left,) = (data / "staging").iterdir()
        assert list(left.iterdir())
        assert said(other.client, "shared", PREFIX) == first
        assert push(other.client, "later", adapters[1], 33).status_code == 201
        assert other.client.delete("/v1/adapters/later").status_code == 200
        assert not list((data / "staging").iterdir())
        state = state_of(other.client)
        blobs = {path.name for path in (data / "blobs").iterdir()}
        assert blobs == {row["digest"] for row in state["rows"]} | {
            other.client.get("/v1/adapters/shared@2").json()["digest"]
        }
        assert said(other.client, "shared@2", PREFIX) == second


@contextmanager
def half_an_upload(server: ServerProcess) -> Iterator[None]:
    """An upload of which some has come to the disk."""
    url = server.client.base_url
    with socket.create_connection((url.host, url.port or 80)) as connection:
        connection.sendall(
            b"POST /v1/adapters HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 3000000\r\n"
            b"Content-Type: multipart/form-data; boundary=x\r\n\r\n"
            b'--x\r\nContent-Disposition: form-data; name="weights"; filename="w"\r\n\r\n' + bytes(2 << 20)
        )
        while not [file for file in server.data_dir.glob("staging/*/*") if file.stat().st_size]:
            time.sleep(0.01)
        yield


def test_a_registry_that_is_not_the_stores(make_settings, tmp_path: Path):
    """A wrong --registry-url must not make the sweep remove what another registry names."""
    with LiveServer(make_settings(tmp_path / "data")):
        pass
    blobs = list((tmp_path / "data" / "blobs").iterdir())
    assert blobs
    wrong = make_settings(tmp_path / "data", adapters=None, registry_url=f"sqlite:///{tmp_path / 'wrong.sqlite'}")
    with pytest.raises(StartupError, match="belong to another registry"):
        LiveServer(wrong).__enter__()
    assert list((tmp_path / "data" / "blobs").iterdir()) == blobs


def test_a_deletion_whose_sweep_is_refused(make_settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The adapter is deleted, which is what the reply says; its files go with the next sweep."""
    with LiveServer(make_settings(tmp_path / "data")) as server:
        catalog, client = server.service.catalog, server.client

        def refuse() -> list[str]:
            raise StorageFull("The disk refuses.")

        with monkeypatch.context() as patch:
            patch.setattr(catalog, "sweep", refuse)
            assert client.delete("/v1/adapters/red").json()["deleted"] == ["red@1"]
        assert client.get("/v1/adapters/red").status_code == 404
        assert len(catalog.store.digests()) == 2
        client.delete("/v1/adapters/blue")
        assert not catalog.store.digests()
        server.check_at_rest()


def test_the_audit_trail(make_settings, adapter_folders: dict[str, Path], tmp_path: Path):
    """Who: the operator's folders, and callers by their key."""
    with LiveServer(make_settings(tmp_path / "data", api_key="sesame-open")) as server:
        client = server.client
        assert client.get("/v1/audit").status_code == 401
        client.headers["authorization"] = "Bearer sesame-open"
        push(client, "red", adapter_folders["green"])
        client.post("/v1/adapters/red/rollback", json={"version": 1})
        client.delete("/v1/adapters/red@2")
        reply = client.get("/v1/adapters/red/history").json()
        me = "key:" + hashlib.sha256(b"sesame-open").hexdigest()[:8]
        assert [(event["who"], event["action"], event["version"]) for event in reply["data"]] == [
            (me, "delete", 2),
            (me, "rollback", 1),
            (me, "push", 2),
            ("operator", "push", 1),
        ]
        latest = reply["data"][0]
        assert (latest["was"], latest["now"], latest["object"]) == ("red@1", "red@1", "event")
        assert datetime.fromisoformat(latest["at"]).tzinfo is not None
        assert reply["total"] == 4
        everything = client.get("/v1/audit").json()
        assert everything["total"] == 5
        assert client.get("/v1/audit?offset=1&limit=2").json()["data"] == everything["data"][1:3]
        assert_error(client.get("/v1/audit?limit=0"), 400, "invalid_request", param="limit")
        assert_error(client.get("/v1/adapters/never/history"), 404, "model_not_found", "no adapter 'never'")
        assert "sesame" not in str(everything)


def test_rollbacks_that_are_refused(make_settings, adapter_folders: dict[str, Path], tmp_path: Path):
    with LiveServer(make_settings(tmp_path / "data")) as server:
        client = server.client
        path = "/v1/adapters/red/rollback"
        assert_error(client.post(path), 409, "adapter_conflict", "nothing to roll back to", param="version")
        assert_error(client.post(path, json={"version": 9}), 404, "model_not_found", "no version 9", param="model")
        assert_error(client.post(path, json={"version": 0}), 400, "invalid_request", param="version")
        assert_error(client.post(path, json={"to": 1}), 400, "invalid_request", "to", param="to")
        assert_error(client.post("/v1/adapters/red@1/rollback"), 400, "invalid_request", "Roll back a name")
        assert_error(client.post("/v1/adapters/never/rollback"), 404, "model_not_found", "no adapter 'never'")
        assert_error(client.post("/v1/adapters/base/rollback"), 400, "invalid_request", "base model")
        assert client.post(path, json={"version": 1}).json()["previous"] == "red@1", "it is that already"
        assert client.get("/v1/adapters/red/history").json()["total"] == 1
