"""Bars: what DESIGN §8 asks of a CPU, measured in one sitting and held against its limits.

In process: `StepBench`. Over HTTP: a server of this installation with a random base of 124.7 M parameters and random
adapters of rank 16; every run is repeated, the runs take turns, and the median counts.

The peers' figures (llama.cpp, vLLM, PEFT) come from another machine: one core of an AMD Genoa. Such a bar is shown with
a star and says little until the peer runs in the same sitting.
"""

import asyncio
import gc
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loraplex.bench.arrivals import ClosedLoop
from loraplex.bench.bar import NOT_MEASURED, Bar
from loraplex.bench.machine import MachineLimits
from loraplex.bench.own_server import OwnServer
from loraplex.bench.popularity import Popularity
from loraplex.bench.preparation import BaseShape
from loraplex.bench.random_model import save_random_base
from loraplex.bench.serve import ServeBench, ServeRun, ServeSettings
from loraplex.bench.step import StepBench, StepSettings

GB = 1e9
NUM_HOT = 8
NUM_IN_RAM = 100
MAX_MODEL_LEN = 512
ELSEWHERE = (
    "The limit is made of a peer's figure on another machine (one core of an AMD Genoa; bf16, 124.7 M parameters): it "
    "says nothing certain until the peer runs beside this server."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BarsSettings:
    """requests   of each run with `clients`; the run with one client has a tenth, at least 6
    repeats    of each run over HTTP
    many       adapters of the Zipf run; 0: left out
    pin        the server on the last core, this process on the others
    shape      changes to the model's config
    """

    rounds: int = 12
    requests: int = 64
    repeats: int = 3
    clients: int = 32
    adapters: int = 32
    many: int = 1000
    threads: int = 1
    pin: bool = False
    shape: Mapping[str, Any] = field(default_factory=dict)


class Bars:
    def __init__(
        self,
        settings: BarsSettings,
        show: Callable[[str], object] = lambda _: None,
        limits: MachineLimits | None = None,
    ):
        """`show` is told what is being measured. `limits` None: measured here."""
        self._settings = settings
        self._show = show
        self._limits = limits
        self._errors: list[str] = []

    def run(self) -> dict[str, Any]:
        """{"title", "machine", "bars", "notes", "errors", "step", "serve"}: see `loraplex bench bars --json`."""
        step = self._step()
        runs: dict[str, list[ServeRun]] = {}
        peak = None
        with tempfile.TemporaryDirectory(prefix="loraplex-bars-") as name, self._pinned() as cores:
            folder = Path(name)
            self._show("write a random model")
            base = save_random_base(folder / "base", **self._settings.shape)
            runs |= self._serve_mix(base, folder, cores)
            if self._settings.many:
                many, peak = self._serve_many(base, folder, cores)
                runs |= many
        bars = [*step_bars(step["ratios"]), *self._http_bars(runs), *self._many_bars(runs, peak)]
        return {
            "title": "CPU bars",
            "settings": asdict(self._settings) | {"shape": dict(self._settings.shape)},
            "machine": step["machine"],
            "bars": [bar.to_json() for bar in bars],
            "notes": [ELSEWHERE] if any(bar.is_elsewhere for bar in bars) else [],
            "errors": self._errors,
            "step": step,
            "serve": {name: [run.report for run in repeated] for name, repeated in runs.items()},
        }

    # -- measurements -----------------------------------------------------------------------------------------

    def _step(self) -> dict[str, Any]:
        settings = self._settings
        self._show("machine and bench step")
        bench = StepBench(
            StepSettings(rounds=settings.rounds, threads=settings.threads, device="cpu", shape=settings.shape),
            self._limits,
        )
        self._limits = bench.limits
        result = bench.run()
        del bench
        gc.collect()  # its model and adapters: the server needs the memory
        return result

    def _serve_mix(self, base: Path, folder: Path, cores: set[int] | None) -> dict[str, list[ServeRun]]:
        settings = self._settings
        mix = {"adapters": settings.adapters, "popularity": Popularity("distinct")}
        loop = {"arrivals": ClosedLoop(settings.clients), "requests": settings.requests}
        alone = {"arrivals": ClosedLoop(1), "requests": max(6, settings.requests // 10)}
        with OwnServer(self._arguments(base, folder), folder, cores) as server:
            self._prepare(server, base, settings.adapters)
            return self._take_turns(
                server,
                {
                    "mix": {**mix, **loop},
                    "base": {"adapters": 0, **loop},
                    "one_client": {"adapters": 1, **alone},
                },
            )

    def _serve_many(
        self, base: Path, folder: Path, cores: set[int] | None
    ) -> tuple[dict[str, list[ServeRun]], int | None]:
        """A few adapters against many under Zipf traffic, with RAM for a hundred; and the server's peak memory."""
        settings = self._settings
        loop = {"arrivals": ClosedLoop(settings.clients), "requests": 2 * settings.requests}
        arguments = self._arguments(base, folder)
        weights = self._adapter_bytes(base)
        arguments += ["--adapter-cache-bytes", str(NUM_IN_RAM * weights)]
        with OwnServer(arguments, folder, cores) as server:
            self._prepare(server, base, settings.many)
            runs = self._take_turns(
                server,
                {
                    "few": {"adapters": min(NUM_HOT, settings.many), **loop},
                    "many": {"adapters": settings.many, "popularity": Popularity("zipf", 1.0), **loop},
                },
            )
            return runs, server.memory_bytes("VmHWM")

    def _arguments(self, base: Path, folder: Path) -> list[str]:
        settings = self._settings
        sizes = {
            "threads": settings.threads,
            "max-loras": settings.adapters,
            "max-num-seqs": settings.clients,
            "max-model-len": MAX_MODEL_LEN,
        }
        flags = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
        # a thousand proofs would take longer than all that is measured, and would leave their adapters in RAM
        return [str(base), "--data-dir", str(folder / "data"), "--device", "cpu", "--proof", "off", *flags]

    def _adapter_bytes(self, base: Path) -> int:
        shape = BaseShape.read(base)
        cost = shape.cost(shape.dtype)
        return int(cost.adapter_numel(ServeSettings(url="").rank) * cost.value_bytes)

    def _prepare(self, server: OwnServer, base: Path, count: int) -> None:
        self._show(f"push {count} random adapters")
        one = {"prepare": count, "adapters": min(1, count), "arrivals": ClosedLoop(1), "requests": 1}
        self._serve(server, "push", {**one, "base": base})

    def _take_turns(self, server: OwnServer, runs: Mapping[str, Mapping[str, Any]]) -> dict[str, list[ServeRun]]:
        done: dict[str, list[ServeRun]] = {name: [] for name in runs}
        for turn in range(self._settings.repeats):
            for name, changes in runs.items():
                self._show(f"bench serve: {name}, {turn + 1} of {self._settings.repeats}")
                done[name].append(self._serve(server, name, {"seed": turn, **changes}))
        return done

    def _serve(self, server: OwnServer, name: str, changes: Mapping[str, Any]) -> ServeRun:
        run = asyncio.run(ServeBench(ServeSettings(url=server.url, limits=self._limits, **changes)).run())
        if not run.is_good:
            requests = run.report["requests"]
            self._errors.append(f"{name}: {requests['failed']} of {requests['sent']} failed: {requests['errors']}")
        return run

    @contextmanager
    def _pinned(self) -> Iterator[set[int] | None]:
        """The server's cores; this process keeps off them inside."""
        if not self._settings.pin or not hasattr(os, "sched_setaffinity"):
            yield None
            return
        cores = os.sched_getaffinity(0)
        last = {max(cores)}
        os.sched_setaffinity(0, cores - last or cores)
        try:
            yield last
        finally:
            os.sched_setaffinity(0, cores)

    # -- bars -------------------------------------------------------------------------------------------------

    def _http_bars(self, runs: Mapping[str, list[ServeRun]]) -> list[Bar]:
        mix, base, alone = (_rate(runs[name]) for name in ("mix", "base", "one_client"))
        waits = [run.report["ttft_ms"]["p50"] / 1e3 for run in runs["mix"] if run.report["ttft_ms"]]
        rates = (
            ("HTTP 32 clients, 32 adapters: 3 × llama.cpp (66)", 3 * 66, mix),
            ("  2.5 × vLLM (79)", 2.5 * 79, mix),
            ("  4 × PEFT mixed batch (48)", 4 * 48, mix),
            ("HTTP base only: vLLM with LoRA on (233)", 233, base),
            ("  next: vLLM compiled (290)", 290, base),
            ("HTTP one client: 0.8 × llama.cpp (70)", 0.8 * 70, alone),
            ("  next: llama.cpp (70)", 70, alone),
        )
        wait = statistics.median(waits) if waits else None
        first = "HTTP 32 clients, 32 adapters: median time to first token"
        return [
            Bar(bar=first, limit=3.0, unit="s", measured=wait, is_least=False),
            *(
                Bar(bar=name, limit=limit, unit="tokens/s", measured=value, is_elsewhere=True)
                for name, limit, value in rates
            ),
        ]

    def _many_bars(self, runs: Mapping[str, list[ServeRun]], peak: int | None) -> list[Bar]:
        ratio = None
        if "many" in runs:
            few = _rate(runs["few"])
            ratio = _rate(runs["many"]) / few if few else None
        memory = None if peak is None else peak / GB
        name = f"HTTP {self._settings.many or 1000} adapters, Zipf 1.0 / {NUM_HOT} adapters"
        return [
            Bar(bar=name, limit=0.93, unit="×", measured=ratio),
            Bar(bar="  peak memory of that server", limit=1.2, unit="GB", measured=memory, is_least=False),
        ]


def step_bars(ratios: Mapping[str, float]) -> list[Bar]:
    """Those in process, from the ratios of `StepBench.run`."""

    def times(bar: str, limit: float, name: str, note: str = NOT_MEASURED) -> Bar:
        return Bar(bar=bar, limit=limit, unit="×", measured=ratios.get(name), note=note)

    ops = ratios.get("lora_ops_in_base_only_step")
    return [
        times("32 adapters in 32 / base only", 0.75, "distinct_32_of_32"),
        times("8 adapters in 8 / base only", 0.72, "distinct_8_of_8"),
        times("one adapter at batch 1 / base", 0.88, "single_batch_1"),
        times("one merged adapter at batch 1 / base", 0.97, "merged_batch_1"),
        times("  at batch 8", 0.97, "merged_batch_8"),
        Bar(bar="LoRA ops in a base-only step", limit=0, unit="ops", measured=ops, is_least=False),
        times("base at batch 1 / memory bandwidth", 0.55, "base_share_of_bandwidth_batch_1"),
        times("  the same, stretch", 0.70, "base_share_of_bandwidth_batch_1"),
    ]


def _rate(runs: list[ServeRun]) -> float:
    """Tokens a second, the median of the runs."""
    return statistics.median(run.report["tokens_per_second"] for run in runs)
