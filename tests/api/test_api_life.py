"""Clients that go away, full queues, keys, and an engine that fails or dies."""

import asyncio
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from live import LiveServer, assert_error
from test_api_completions import complete, stream, text_of

from loraplex.api.streaming import EventStream

LONG = {"model": "red", "prompt": "the quick brown", "max_tokens": 200, "ignore_eos": True, "temperature": 0}


def connect(server: LiveServer, body: dict, path: str = "/v1/completions") -> socket.socket:
    """Send a request and leave its answer unread."""
    host, port = server.url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n"
    )
    connection = socket.create_connection((host, int(port)))
    connection.sendall(head.encode() + b"\r\n" + content)
    return connection


# -- clients that go away -------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_running_request_ends_with_its_client(server: LiveServer, is_streamed):
    before = server.stats.num_generated
    with server.paused():
        with connect(server, {**LONG, "stream": is_streamed}):
            server.wait_until_computing()
        server.wait_until(lambda: server.service.num_running == 0, "noticing that the client is gone")
    server.wait_until(lambda: server.is_idle, "the abort")
    assert server.stats.num_generated - before < 50


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_waiting_request_ends_with_its_client(server: LiveServer, is_streamed):
    """The batch is full, so this one only waits."""
    with ThreadPoolExecutor() as pool:
        with server.paused():
            running = pool.submit(complete, server.client, prompt=["a", "b"], n=8, max_tokens=100)
            server.wait_until(lambda: server.service.num_running == 16, "filling the batch")
            with connect(server, {**LONG, "stream": is_streamed}):
                server.wait_until(lambda: server.service.num_running == 17, "queueing")
            server.wait_until(lambda: server.service.num_running == 16, "leaving the queue")
        assert len(running.result()["choices"]) == 16


def test_a_client_that_reads_some_and_goes(server: LiveServer):
    before = server.stats.num_generated
    with server.client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as reply:
        next(reply.iter_lines())
    server.wait_until(lambda: server.is_idle, "the abort")
    assert server.stats.num_generated - before <= 200


def test_a_client_that_never_reads(server: LiveServer):
    """Its answer piles up in the socket's buffers; others are served, and it is let go of in the end."""
    body = {**LONG, "model": "base", "prompt": ["a"] * 8, "max_tokens": 250, "stream": True, "logprobs": 20}
    with connect(server, body) as connection:
        assert connection.recv(1)
        assert text_of(server.client, model="blue", max_tokens=3)
    server.wait_until(lambda: server.is_idle, "the abort")


def test_many_clients_that_go_at_random_moments(server: LiveServer):
    def come_and_go(seed: int) -> None:
        with connect(
            server, {**LONG, "seed": seed, "model": ("base", "red", "blue")[seed % 3], "stream": seed % 2 == 0}
        ) as c:
            c.settimeout(0.001 * (seed % 7) + 0.001)
            try:
                while c.recv(512):
                    pass
            except TimeoutError:
                pass

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(come_and_go, range(40)))
    server.wait_until(lambda: server.is_idle, "coming to rest")


def test_a_stream_that_never_starts_lets_go():
    """The client is gone before the first byte: a generator that never ran has no `finally` that runs."""
    closed = []

    async def events():
        yield b"never sent"  # pragma: no cover

    async def close():
        closed.append(True)

    async def run():
        async def gone():
            return {"type": "http.disconnect"}

        async def send(message):
            raise OSError("the connection broke")

        await EventStream(events(), {}, close)({"type": "http"}, gone, send)

    asyncio.run(run())
    assert closed == [True]


# -- full queues ----------------------------------------------------------------------------------------------


def test_a_full_queue(server: LiveServer, client):
    with ThreadPoolExecutor() as pool:
        with server.paused():
            both = [pool.submit(complete, client, prompt="a", n=16, max_tokens=2) for _ in range(2)]
            server.wait_until(lambda: server.service.num_running == 32, "filling the queue")
            for is_streamed in (False, True):
                reply = client.post("/v1/completions", json={"model": "base", "prompt": "a", "stream": is_streamed})
                assert_error(reply, 503, "overloaded", "32", "Try again")
                assert 1 <= int(reply.headers["retry-after"]) <= 120
            # Probes and errors do not queue.
            assert client.get("/health").status_code == 200
            assert client.post("/v1/completions", json={"model": "nobody", "prompt": "a"}).status_code == 404
        for answers in both:
            assert len(answers.result()["choices"]) == 16


# -- failures -------------------------------------------------------------------------------------------------


def test_a_failed_step_ends_its_requests_with_an_error(server: LiveServer, client, monkeypatch):
    def fail(batch):
        raise RuntimeError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(server.engine.runner, "execute", fail)
        reply = client.post("/v1/completions", json=LONG)
        assert_error(reply, 500, "engine_step_failed", "injected")
        [*_, last] = stream(client, model="red", max_tokens=3)
        assert last["error"]["code"] == "engine_step_failed"
    assert text_of(client, model="red", max_tokens=3)


def test_a_failure_in_the_middle_of_a_stream(server: LiveServer, client, monkeypatch):
    execute, count = server.engine.runner.execute, 0

    def fail_later(batch):
        nonlocal count
        count += 1
        if count == 5:
            raise RuntimeError("injected")
        return execute(batch)

    monkeypatch.setattr(server.engine.runner, "execute", fail_later)
    *chunks, last = stream(client, max_tokens=30)
    assert all("error" not in chunk for chunk in chunks)
    assert set(last) == {"error"}
    assert last["error"]["type"] == "server_error"


def test_an_unexpected_error_in_a_stream(server: LiveServer, client, monkeypatch):
    monkeypatch.setattr("loraplex.serving.generation.Generation._take", lambda *args: 1 / 0)
    [*_, last] = stream(client, max_tokens=30)
    assert last["error"]["code"] == "internal_error"


def test_an_adapter_that_cannot_be_read_ends_its_own_requests_only(server: LiveServer, client, adapter_folders):
    from test_api_adapters import push

    digest = push(client, "torn", adapter_folders["green"]).json()["digest"]
    (server.service.catalog.store.path(digest) / "adapter_model.safetensors").write_bytes(b"torn")
    server.call(server.service.engine.command("evict", digests=[digest]))
    with ThreadPoolExecutor() as pool:
        good = pool.submit(text_of, client, model="red", max_tokens=30)
        reply = client.post("/v1/completions", json={"model": "torn", "prompt": "a"})
        assert_error(reply, 500, "adapter_load_failed", "SHA-256", "Push the adapter again")
        assert reply.headers["x-should-retry"] == "false"
        assert good.result()
    push(client, "torn", adapter_folders["green"])  # heals the files
    assert text_of(client, model="torn", max_tokens=3)
    client.delete("/v1/adapters/torn")


def test_a_dead_engine(make_settings, tmp_path):
    with LiveServer(make_settings(tmp_path / "data", adapters=None)) as server:
        client = server.client

        def fail(batch):
            raise RuntimeError("injected")

        server.engine.runner.execute = fail
        for _ in range(2):
            reply = client.post("/v1/completions", json={"model": "base", "prompt": "a"})
            assert_error(reply, 500, "engine_step_failed")
        reply = client.post("/v1/completions", json={"model": "base", "prompt": "a"})
        assert_error(reply, 503, "not_ready", "died")
        server.wait_until(lambda: bool(server.deaths), "the death")
        assert "3 steps in a row failed" in server.deaths[0]
        for path in ("/health", "/ready"):
            health = client.get(path)
            assert (health.status_code, health.json()["status"]) == (503, "dead")
            assert "injected" in health.json()["reason"]
        assert_error(
            client.post("/v1/completions", json={"model": "base", "prompt": "a"}), 503, "not_ready", "not running"
        )
        assert_error(client.get("/v1/adapters"), 503, "not_ready")
        assert client.get("/metrics").status_code == 200
        assert client.get("/v1/models").status_code == 200


def test_draining(server: LiveServer, client, monkeypatch):
    monkeypatch.setattr(server.service, "is_draining", True)
    health = client.get("/health")
    assert (health.status_code, health.json(), "retry-after" in health.headers) == (503, {"status": "draining"}, True)
    reply = client.post("/v1/completions", json={"model": "base", "prompt": "a"})
    assert_error(reply, 503, "draining", "shutting down")
    monkeypatch.undo()


def test_metrics_while_the_engine_waits_for_an_adapter(server: LiveServer, client, monkeypatch):
    """A stalled engine answers commands all the same."""
    may_read = threading.Event()
    read = server.engine.loads._read

    def slowly(*arguments):
        may_read.wait()
        return read(*arguments)

    monkeypatch.setattr(server.engine.loads, "_read", slowly)
    digest = server.service.resolve("blue").adapter.digest
    server.call(server.service.engine.command("evict", digests=[digest]))
    with ThreadPoolExecutor() as pool:
        try:
            waiting = pool.submit(text_of, client, model="blue", max_tokens=2)
            server.wait_until(lambda: server.stats.waiting_digests == (digest,), "waiting for the load")
            assert 'waiting_lora_adapters="blue"' in client.get("/metrics").text
            assert text_of(client, model="base", max_tokens=2)
        finally:
            may_read.set()
        assert waiting.result()


# -- who may come in ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked(make_settings, tmp_path_factory):
    settings = make_settings(tmp_path_factory.mktemp("locked"), adapters=None, api_key="sesame-open")
    with LiveServer(settings) as server:
        yield server


def test_the_api_key(locked: LiveServer):
    client = locked.client
    for path in ("/health", "/ready", "/version"):
        assert client.get(path).status_code == 200
    body = {"model": "base", "prompt": "a", "max_tokens": 1}
    for path in ("/v1/models", "/metrics", "/v1/adapters", "/openapi.json", "/nowhere", "/tokenizer_info"):
        assert_error(client.get(path), 401, "invalid_api_key", "Authorization: Bearer")
        assert client.head(path).status_code == 401
    for header in ("Bearer wrong", "Basic sesame-open", "sesame-open", "Bearer", "Bearer sesame-open2", "Bearer \xff"):
        reply = client.post("/v1/completions", json=body, headers={"authorization": header.encode("latin-1")})
        assert_error(reply, 401, "invalid_api_key")
        assert reply.headers["www-authenticate"] == "Bearer"
    for header in ("Bearer sesame-open", "bearer  sesame-open"):
        assert client.post("/v1/completions", json=body, headers={"authorization": header}).status_code == 200
    # A large upload without a key is told about the key, not cut off.
    reply = client.post("/v1/adapters", content=b"x" * (5 << 20))
    assert_error(reply, 401, "invalid_api_key")
    # With a key any Host header is fine.
    headers = {"authorization": "Bearer sesame-open", "host": "models.example:80"}
    assert client.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:8000", "localhost:8000", "LOCALHOST", "[::1]", "[::1]:8000"])
def test_own_hosts(client, host):
    assert client.get("/health", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "[::2]", "[", "10.0.0.1"]
)
def test_foreign_hosts(client, host):
    reply = client.get("/v1/models", headers={"host": host})
    assert_error(reply, 400, "invalid_host", "--api-key")


def test_forms_of_foreign_pages(client, green, tmp_path):
    """Browsers send multipart forms anywhere without asking."""
    reply = client.post(
        "/v1/adapters",
        data={"name": "bad"},
        files=green.parts(tmp_path),
        headers={"origin": "https://evil.example"},
    )
    assert_error(reply, 403, "forbidden_origin")
    assert client.get("/v1/models", headers={"origin": "null"}).status_code == 403
    assert client.get("/v1/models", headers={"origin": "http://localhost:3000"}).status_code == 200


def test_an_expected_refusal_comes_before_the_body(server: LiveServer):
    """curl asks before it sends a large body; a refusal must not make it send."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            b"Content-Length: 99999999\r\nExpect: 100-continue\r\n\r\n"
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")
