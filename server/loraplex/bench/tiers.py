"""TiersBench: what thousands of registered adapters cost a server, and what a load from disk takes.

A server of this installation with a random base and random adapters, over HTTP: starts with none and with all of them,
pages of the list, memory, then requests for adapters at random with RAM for few. Memory is anonymous (RssAnon): without
the libraries' files.
"""

import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import torch

from loraplex.bench.arrivals import ClosedLoop
from loraplex.bench.machine import MachineLimits, measure_limits
from loraplex.bench.own_server import OwnServer
from loraplex.bench.popularity import Popularity
from loraplex.bench.preparation import BaseShape
from loraplex.bench.random_model import save_random_base
from loraplex.bench.serve import ServeBench, ServeSettings
from loraplex.bench.server import BenchFailed

MAX_MODEL_LEN = 512
PHASES = ("disk", "convert", "copy")


@dataclass(frozen=True, slots=True, kw_only=True)
class TiersSettings:
    """in_ram   adapters that RAM holds
    loads       requests with one token each, in `rounds` rounds
    repeats     of each start
    page        adapters on a page of the list
    shape       changes to the model's config
    """

    adapters: int = 2000
    rank: int = 4
    in_ram: int = 100
    loads: int = 2000
    rounds: int = 8
    repeats: int = 3
    page: int = 100
    threads: int = 1
    shape: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Start:
    """`seconds` from the process's to "ready"; `anonymous` bytes then."""

    seconds: float
    anonymous: int


class TiersBench:
    def __init__(
        self,
        settings: TiersSettings,
        show: Callable[[str], object] = lambda _: None,
        limits: MachineLimits | None = None,
    ):
        """`show` is told what is being done. `limits` None: measured here."""
        self._settings = settings
        self._show = show
        self._limits = limits

    def run(self) -> dict[str, Any]:
        """{"settings", "start", "idle_bytes_per_adapter", "list", "loads"}; seconds, milliseconds and bytes."""
        settings = self._settings
        if self._limits is None:
            self._limits = measure_limits(torch.device("cpu"), settings.threads, (torch.bfloat16,))
        with tempfile.TemporaryDirectory(prefix="loraplex-tiers-") as name:
            folder = Path(name)
            self._show("write a random model")
            base = save_random_base(folder / "base", **settings.shape)
            adapter_bytes = self._adapter_bytes(base)
            arguments = self._arguments(base, folder, settings.in_ram * adapter_bytes)
            self._start(arguments, folder)  # compiles the kernels, if nobody has
            none = [self._start(arguments, folder) for _ in range(settings.repeats)]
            push_seconds = self._push(arguments, folder, base)
            all_of_them = [self._start(arguments, folder) for _ in range(settings.repeats)]
            with OwnServer(arguments, folder) as server:
                listing = asyncio.run(self._list(server))
                loads = self._load(server)
        idle = _median(all_of_them, "anonymous") - _median(none, "anonymous")
        return {
            "settings": asdict(settings) | {"shape": dict(settings.shape)},
            "adapter_bytes": adapter_bytes,
            "push_seconds": push_seconds,
            "start": {"none": [asdict(start) for start in none], "all": [asdict(start) for start in all_of_them]},
            "start_seconds": {"none": _median(none, "seconds"), "all": _median(all_of_them, "seconds")},
            "idle_bytes_per_adapter": idle / settings.adapters,
            "list": listing,
            "loads": loads,
        }

    def _arguments(self, base: Path, folder: Path, cache_bytes: int) -> list[str]:
        data = ["--data-dir", str(folder / "data"), "--adapter-cache-bytes", str(cache_bytes)]
        sizes = ["--device", "cpu", "--threads", str(self._settings.threads), "--max-model-len", str(MAX_MODEL_LEN)]
        return [str(base), *data, *sizes]

    def _adapter_bytes(self, base: Path) -> int:
        shape = BaseShape.read(base)
        cost = shape.cost(shape.dtype)
        return int(cost.adapter_numel(self._settings.rank) * cost.value_bytes)

    def _start(self, arguments: list[str], folder: Path) -> Start:
        self._show("start")
        started = time.perf_counter()
        with OwnServer(arguments, folder) as server:
            return Start(time.perf_counter() - started, _anonymous(server))

    def _push(self, arguments: list[str], folder: Path, base: Path) -> float:
        settings = self._settings
        self._show(f"push {settings.adapters} random adapters")
        started = time.perf_counter()
        with OwnServer(arguments, folder) as server:
            one = {"adapters": 1, "arrivals": ClosedLoop(1), "requests": 1}
            self._serve(server, prepare=settings.adapters, rank=settings.rank, base=base, **one)
        return time.perf_counter() - started

    async def _list(self, server: OwnServer) -> dict[str, float]:
        """Milliseconds of the pages of /v1/adapters, and of what shows all names at once."""
        self._show("list")
        settings = self._settings
        async with httpx2.AsyncClient(base_url=server.url, timeout=60.0, trust_env=False) as client:

            async def get(path: str, **params: int) -> float:
                started = time.perf_counter()
                (await client.get(path, params=params)).raise_for_status()
                return (time.perf_counter() - started) * 1e3

            await get("/v1/adapters", limit=1)
            offsets = range(0, settings.adapters, settings.page)
            pages = [await get("/v1/adapters", offset=offset, limit=settings.page) for offset in offsets]
            whole = {path: min([await get(path) for _ in range(3)]) for path in ("/v1/models", "/metrics")}
        return {"page_p50_ms": statistics.median(pages), "page_max_ms": max(pages), **whole}

    def _load(self, server: OwnServer) -> dict[str, Any]:
        """Memory after every round of loads, and where their time went."""
        settings = self._settings
        rounds = []
        for turn in range(settings.rounds):
            self._show(f"load, {turn + 1} of {settings.rounds}")
            mix = {"adapters": settings.adapters, "popularity": Popularity("uniform"), "arrivals": ClosedLoop(32)}
            short = {"requests": max(1, settings.loads // settings.rounds), "prompt_tokens": 8, "output_tokens": 1}
            self._serve(server, **mix, **short, seed=turn, warm_up=0)
            rounds.append(_anonymous(server))
        sums = server.phase_seconds("loraplex_adapter_load_seconds", PHASES)
        count = int(sums["disk"][0])
        return {
            "count": count,
            "anonymous": rounds,
            "mean_ms": {phase: sums[phase][1] / max(1.0, sums[phase][0]) * 1e3 for phase in PHASES},
        }

    def _serve(self, server: OwnServer, **changes: Any) -> None:
        run = asyncio.run(ServeBench(ServeSettings(url=server.url, limits=self._limits, **changes)).run())
        if not run.is_good:
            requests = run.report["requests"]
            raise BenchFailed(f"{requests['failed']} of {requests['sent']} requests failed: {requests['errors']}.")


def _anonymous(server: OwnServer) -> int:
    found = server.memory_bytes("RssAnon")
    if found is None:
        raise BenchFailed("This system does not tell a process's anonymous memory; the tiers are measured on Linux.")
    return found


def _median(starts: list[Start], name: str) -> float:
    return statistics.median(getattr(start, name) for start in starts)
