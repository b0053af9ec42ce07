"""A server over a real socket, inside the test process: its engine can be looked at, paused and broken."""

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import pytest
import uvicorn

import loraplex.service
from loraplex.api.app import create_app
from loraplex.config import Settings
from loraplex.engine.engine import Engine, EngineStats
from loraplex.service import Service

T = TypeVar("T")
DEADLINE = 30.0


class LiveServer:
    """`service` and `engine` are the real ones; use `call` to run something on the server's event loop."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.deaths: list[str] = []
        self.service: Service
        self.engine: Engine
        self.url: str
        self._gate = threading.Event()
        self._gate.set()
        self._at_gate = threading.Event()
        self._server: uvicorn.Server
        self._loop: asyncio.AbstractEventLoop
        self._ready = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="server")

    def __enter__(self) -> "LiveServer":
        self._thread.start()
        self._ready.wait()
        if self._error is not None:
            raise self._error
        self.client = httpx2.Client(base_url=self.url, timeout=60)
        return self

    def __exit__(self, *_: object) -> None:
        self._gate.set()
        self.client.close()
        self._server.should_exit = True
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self._error = error
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        async with AsyncExitStack() as stack:
            with pytest.MonkeyPatch.context() as patch:
                build = loraplex.service.build_engine
                patch.setattr(loraplex.service, "build_engine", lambda *args: self._keep(build(*args)))
                running = Service.running(self.settings, self.deaths.append)
                self.service = await stack.enter_async_context(running)
            config = uvicorn.Config(
                create_app(self.service), port=0, http="h11", log_config=None, lifespan="off", ws="none"
            )
            self._server = uvicorn.Server(config)
            serving = asyncio.ensure_future(self._server.serve())
            while not self._server.started:
                await asyncio.sleep(0.01)
            host, port = self._server.servers[0].sockets[0].getsockname()
            self.url = f"http://{host}:{port}"
            self._ready.set()
            await serving

    def _keep(self, built: tuple[Engine, Any]) -> tuple[Engine, Any]:
        self.engine = built[0]
        execute = self.engine.runner.execute

        def gated(batch):
            self._at_gate.set()
            self._gate.wait()
            return execute(batch)

        self.engine.runner.execute = gated  # type: ignore[method-assign]
        return built

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(DEADLINE)

    @property
    def stats(self) -> EngineStats:
        return self.call(self.service.stats())

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The engine stops in front of its next step. Commands wait, too."""
        self._at_gate.clear()
        self._gate.clear()
        try:
            yield
        finally:
            self._gate.set()

    def wait_until_computing(self) -> None:
        """Within `paused`: until a step stands at the gate."""
        assert self._at_gate.wait(DEADLINE)

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + DEADLINE
        while not condition():
            assert time.monotonic() < deadline, f"{what} did not happen in {DEADLINE} s"
            time.sleep(0.002)

    @property
    def is_idle(self) -> bool:
        stats = self.stats
        return stats.num_running == stats.num_waiting == self.service.num_running == 0

    @property
    def staging(self) -> list[Path]:
        return list((self.service.settings.resolved_data_dir / "staging").iterdir())

    def check_at_rest(self) -> None:
        """Nothing runs, nothing is held, nothing lies about, and the server answers."""
        self.wait_until(lambda: self.is_idle, "coming to rest")
        assert self.client.get("/health").json() == {"status": "ok"}
        assert self.client.post(
            "/v1/completions", json={"model": "base", "prompt": "still", "max_tokens": 1}
        ).is_success
        self.wait_until(lambda: not self.staging, "emptying the staging folder")
        self.wait_until(lambda: not self.service.catalog.store._holds, "letting go of adapters")
        assert self.stats.kv_usage == 0
        self.service.catalog.check_integrity()


def assert_error(reply: httpx2.Response, status: int, code: str, *texts: str, param: str | None = None) -> dict:
    """The reply is OpenAI's error object and says what it should."""
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["x-request-id"]
    body = reply.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["code"] == code
    assert body["error"]["type"] == ("invalid_request_error" if status < 500 else "server_error")
    for text in texts:
        assert text in body["error"]["message"]
    if param is not None:
        assert body["error"]["param"] == param
    assert len(reply.content) < 4096
    return body["error"]
