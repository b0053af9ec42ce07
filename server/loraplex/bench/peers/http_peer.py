"""HttpSetUp: a peer that is an OpenAI-compatible server: started on a free port of 127.0.0.1, loaded by `LoadTest`."""

import asyncio
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import numpy as np

from loraplex.bench.arrivals import ClosedLoop
from loraplex.bench.dialect import Dialect
from loraplex.bench.load import LoadResult, LoadTest, Workload
from loraplex.bench.peers.material import BASE_NAME, Material
from loraplex.bench.peers.memory import MemoryWatch
from loraplex.bench.peers.peer import HOST, Cell, Command, Figures, Running
from loraplex.bench.peers.process import PeerProcess
from loraplex.bench.popularity import Popularity
from loraplex.bench.prompts import Prompts
from loraplex.bench.server import BenchFailed, ServerUnderTest, describe_refusal

START_SECONDS = 600.0
_POLL_SECONDS = 0.2


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        return listener.getsockname()[1]


@dataclass(frozen=True)
class HttpSetUp:
    """`command_for`: the command that serves `material` on a port. `health`: answers 200 when the server is ready."""

    name: str
    material: Material
    command_for: Callable[[int], Command]
    health: str
    has_adapters: bool = True
    dialect: Dialect = field(default_factory=Dialect)
    port: int = field(default_factory=free_port)

    @property
    def command(self) -> Command:
        return self.command_for(self.port)

    @contextmanager
    def start(self, log: Path) -> Iterator[Running]:
        with PeerProcess(self.command, log) as process:
            url = f"http://{HOST}:{self.port}"
            _wait_until_ready(process, url + self.health)
            with MemoryWatch(process.pid) as memory:
                yield RunningServer(url, self.material, self.dialect, memory)


def _wait_until_ready(process: PeerProcess, url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    with httpx2.Client(trust_env=False, timeout=10.0) as http:
        while time.monotonic() < deadline:
            process.check_running()
            try:
                if http.get(url).is_success:
                    return
            except httpx2.HTTPError:
                pass
            time.sleep(_POLL_SECONDS)
    raise BenchFailed(f"It was not ready after {START_SECONDS:.0f} s: {process.log_end()}")


class RunningServer:
    def __init__(self, url: str, material: Material, dialect: Dialect, memory: MemoryWatch):
        self._url = url
        self._material = material
        self._dialect = dialect
        self._memory = memory

    def measure(self, cell: Cell) -> Figures:
        return figures_of(asyncio.run(self._load(cell)), self._memory.peak())

    async def _load(self, cell: Cell) -> LoadResult:
        workload = Workload(
            models=self._material.names[: cell.adapters] or (BASE_NAME,),
            popularity=Popularity("distinct"),
            arrivals=ClosedLoop(cell.clients),
            prompt_tokens=cell.prompt_tokens,
            output_tokens=cell.output_tokens,
            requests=cell.requests,
        )
        async with ServerUnderTest(self._url) as server:
            prompts = Prompts(cell.prompt_tokens, self._material.token_pool)
            load = LoadTest(server, workload, prompts, self._dialect)
            await load.warm_up(len(workload.models))
            return await load.run()

    def first_tokens(self, prompts: Sequence[list[int]], names: Sequence[str]) -> list[str]:
        with httpx2.Client(base_url=self._url, trust_env=False, timeout=120.0) as http:
            return [self._first_token(http, name, prompt) for name in names for prompt in prompts]

    def _first_token(self, http: httpx2.Client, name: str, prompt: list[int]) -> str:
        body: dict[str, Any] = {**self._dialect.body(name, prompt, 1), "stream": False}
        del body["stream_options"]
        reply = http.post(self._dialect.path, json=body)
        if not reply.is_success:
            raise BenchFailed(
                f"A request for {name!r} was refused: {describe_refusal(reply.status_code, reply.content)}."
            )
        return reply.json()["choices"][0]["text"]


def figures_of(result: LoadResult, pss_bytes: int) -> Figures:
    good = result.good
    waits = [1e3 * (outcome.first - outcome.due) for outcome in good if outcome.first is not None]
    per_token = [
        1e3 * (outcome.last - outcome.first) / (outcome.num_tokens - 1)
        for outcome in good
        if outcome.first is not None and outcome.last is not None and outcome.num_tokens > 1
    ]
    return Figures(
        tokens_per_second=sum(outcome.num_tokens for outcome in good) / max(result.seconds, 1e-9),
        ttft_p50=float(np.median(waits)) if waits else None,
        ttft_max=max(waits, default=None),
        per_token_p50=float(np.median(per_token)) if per_token else None,
        pss_bytes=pss_bytes,
        failed=len(result.failed),
        errors=tuple(_errors(result)),
    )


def _errors(result: LoadResult) -> Iterator[str]:
    """What failed, and what makes the figures of the rest say less."""
    for error, count in Counter(str(outcome.error) for outcome in result.failed).items():
        yield f"{count} × {error}"
    short = sum(outcome.num_tokens < result.workload.output_tokens for outcome in result.good)
    if short:
        yield f"{short} answers are shorter than asked for"
    cached = sum(outcome.cached_tokens for outcome in result.good)
    if cached:
        yield f"{cached} prompt tokens came from a prefix cache"
