"""UploadBench: what an upload costs, and what it costs the streams beside it.

A server of this installation with a random base; streams of adapters over HTTP, in turns alone, beside uploads of a
large adapter, and beside plain writes of the same bytes at the same pace. The uploads come from this process, from a
thread that only sends.

The disk's own speed is what a program reaches that does nothing but write those bytes into a new file, in pieces of 1
MiB, and sync it: on the idle machine, and beside the same streams, since on few cores a write waits for one, too.
"""

import asyncio
import http.client
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from loraplex.bench.arrivals import ClosedLoop
from loraplex.bench.load import LoadResult
from loraplex.bench.machine import MachineLimits, measure_limits
from loraplex.bench.own_server import OwnServer
from loraplex.bench.popularity import Popularity
from loraplex.bench.preparation import BaseShape
from loraplex.bench.random_model import save_random_adapter, save_random_base
from loraplex.bench.serve import ServeBench, ServeSettings
from loraplex.bench.server import BenchFailed, describe_refusal

PHASES = ("receive", "check", "prove", "publish")
HISTOGRAM = "loraplex_upload_seconds"
MAX_MODEL_LEN = 512
_PIECE = 1 << 20

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadSettings:
    """megabytes   of the uploaded adapter, 10^6 bytes, about: its rank is a whole number
    idle           uploads to an idle server
    rounds         of streams alone, streams beside uploads and streams beside writes, in turns
    seconds        of each third of a round
    proof          as `serve` takes it
    shape          changes to the model's config
    """

    megabytes: float = 100.0
    streams: int = 8
    idle: int = 5
    rounds: int = 4
    seconds: float = 12.0
    threads: int = 1
    proof: str = "on"
    shape: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class UploadTime:
    """Seconds as the client sees them: until all was sent, and until the 201."""

    sent: float
    accepted: float


class UploadBody:
    """The form of an upload of `folder`; every one that is made has other weights."""

    def __init__(self, folder: Path):
        config, weights = ((folder / f"adapter_{name}").read_bytes() for name in ("config.json", "model.safetensors"))
        head = self._part("config", "adapter_config.json") + config + b"\r\n"
        head += self._part("weights", "adapter_model.safetensors")
        self._parts = head, bytearray(weights), b"\r\n--bench--\r\n"
        self.num_bytes = len(weights)

    @property
    def weights(self) -> bytearray:
        return self._parts[1]

    @staticmethod
    def _part(name: str, file: str) -> bytes:
        kind = "Content-Type: application/octet-stream"
        disposition = f'Content-Disposition: form-data; name="{name}"; filename="{file}"'
        return f"--bench\r\n{disposition}\r\n{kind}\r\n\r\n".encode()

    def make(self, number: int) -> list[bytes | bytearray]:
        """Its pieces, good until the next are made; the last value of the file, a bfloat16, is another each time. Not
        joined: a copy of that size would hold up the streams of this process."""
        head, weights, end = self._parts
        weights[-2:] = (0x3C00 + number % 256).to_bytes(2, "little")
        name = f'--bench\r\nContent-Disposition: form-data; name="name"\r\n\r\nupload-{number}\r\n'.encode()
        return [name, head, weights, end]


class UploadBench:
    def __init__(
        self,
        settings: UploadSettings,
        show: Callable[[str], object] = lambda _: None,
        limits: MachineLimits | None = None,
    ):
        """`show` is told what is being done. `limits` None: measured here."""
        self._settings = settings
        self._show = show
        self._limits = limits
        self._count = 0

    def run(self) -> dict[str, Any]:
        """{"settings", "rank", "bytes", "disk_mb_s", "idle", "beside", "gaps_ms"}; of uploads and writes the
        medians."""
        settings = self._settings
        if self._limits is None:
            self._limits = measure_limits(torch.device("cpu"), settings.threads, (torch.bfloat16,))
        with tempfile.TemporaryDirectory(prefix="loraplex-upload-") as name:
            folder = Path(name)
            self._show("write a random model and adapter")
            base = save_random_base(folder / "base", **settings.shape)
            shape = BaseShape.read(base)
            values = shape.cost(torch.bfloat16).adapter_numel(1)
            rank = max(1, round(settings.megabytes * 1e6 / (2 * values)))
            save_random_adapter(shape.targets.values(), rank, 0, torch.bfloat16, folder / "adapter")
            body = UploadBody(folder / "adapter")
            with OwnServer(self._arguments(base, folder, rank), folder) as server:
                self._stream(server, base, seconds=None)
                self._upload(server, body)  # whatever is done once is done
                idle, writes = self._idle(server, body, folder)
                gaps, beside, writes_beside = self._rounds(server, base, body, folder)
        megabytes = body.num_bytes / 1e6
        return {
            "settings": asdict(settings) | {"shape": dict(settings.shape)},
            "rank": rank,
            "bytes": body.num_bytes,
            "disk_mb_s": {
                "idle": megabytes / statistics.median(writes),
                "beside": megabytes / statistics.median(writes_beside),
            },
            "idle": idle,
            "beside": beside,
            "gaps_ms": {name: _spread(values) for name, values in gaps.items()},
        }

    def _arguments(self, base: Path, folder: Path, rank: int) -> list[str]:
        settings = self._settings
        sizes = ["--threads", str(settings.threads), "--max-model-len", str(MAX_MODEL_LEN)]
        limits = ["--max-lora-rank", str(max(64, rank)), "--adapter-cache-bytes", "4GiB", "--proof", settings.proof]
        return [str(base), "--data-dir", str(folder / "data"), "--device", "cpu", *sizes, *limits]

    # -- uploads ----------------------------------------------------------------------------------------------

    def _idle(self, server: OwnServer, body: UploadBody, folder: Path) -> tuple[dict[str, Any], list[float]]:
        """Uploads to a server that does nothing else, and the seconds of writes between them."""
        before, times, writes = server.phase_seconds(HISTOGRAM, PHASES), [], []
        for turn in range(self._settings.idle):
            self._show(f"upload to the idle server, {turn + 1} of {self._settings.idle}")
            writes.append(_write_seconds(folder / "disk", body.weights))
            times.append(self._upload(server, body))
        return _summary(times, before, server.phase_seconds(HISTOGRAM, PHASES), body.num_bytes / 1e6), writes

    def _rounds(
        self, server: OwnServer, base: Path, body: UploadBody, folder: Path
    ) -> tuple[dict[str, list[float]], dict[str, Any], list[float]]:
        """The streams' gaps in seconds alone, beside uploads ("beside") and beside writes; the uploads; the seconds of
        the writes."""
        settings = self._settings
        gaps: dict[str, list[float]] = {"alone": [], "beside": [], "writes": []}
        times: list[UploadTime] = []
        writes: list[float] = []
        before = server.phase_seconds(HISTOGRAM, PHASES)

        def stream(kind: str, title: str, turn: int) -> None:
            self._show(f"{title}, {turn + 1} of {settings.rounds}")
            gaps[kind] += _gaps(self._stream(server, base, settings.seconds))

        for turn in range(settings.rounds):
            stream("alone", "streams alone", turn)
            with _Beside(lambda: self._upload(server, body)) as uploads:
                stream("beside", "streams beside uploads", turn)
            times += uploads.results
            pace = statistics.median(one.accepted for one in times)
            with _Beside(lambda: _write_seconds(folder / "disk", body.weights), pace) as written:
                stream("writes", "streams beside writes", turn)
            writes += written.results
        return gaps, _summary(times, before, server.phase_seconds(HISTOGRAM, PHASES), body.num_bytes / 1e6), writes

    def _upload(self, server: OwnServer, body: UploadBody) -> UploadTime:
        """Raises BenchFailed with the server's words."""
        self._count += 1
        pieces = body.make(self._count)
        host, port = server.url.removeprefix("http://").split(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=600.0)
        try:
            started = time.perf_counter()
            size = str(sum(len(piece) for piece in pieces))
            headers = {"Content-Type": "multipart/form-data; boundary=bench", "Content-Length": size}
            connection.request("POST", "/v1/adapters", iter(pieces), headers)
            sent = time.perf_counter() - started
            reply = connection.getresponse()
            content = reply.read()
            accepted = time.perf_counter() - started
        except OSError as error:
            raise BenchFailed(f"An upload broke off: {error}.") from error
        finally:
            connection.close()
        if reply.status != 201:
            raise BenchFailed(f"An upload was answered with {describe_refusal(reply.status, content)}.")
        return UploadTime(sent, accepted)

    # -- streams ----------------------------------------------------------------------------------------------

    def _stream(self, server: OwnServer, base: Path, seconds: float | None) -> LoadResult:
        """So many streams for `seconds` (None: one each), every one an adapter's."""
        count = self._settings.streams
        mix: dict[str, Any] = {
            "prepare": count,
            "popularity": Popularity("distinct"),
            "arrivals": ClosedLoop(count),
            "base": base,
        }
        size: dict[str, Any] = {"prompt_tokens": 16, "output_tokens": 128, "limits": self._limits}
        end: dict[str, Any] = {"requests": count} if seconds is None else {"seconds": seconds, "warm_up": 0}
        run = asyncio.run(ServeBench(ServeSettings(url=server.url, **mix, **size, **end)).run())
        if not run.is_good:
            requests = run.report["requests"]
            raise BenchFailed(f"{requests['failed']} of {requests['sent']} requests failed: {requests['errors']}.")
        return run.result


class _Beside(Generic[T]):
    """`work` again and again in a thread, one every `pace` seconds or without a pause, until the block ends; the last
    is waited for."""

    def __init__(self, work: Callable[[], T], pace: float = 0.0):
        self.results: list[T] = []
        self._work = work
        self._pace = pace
        self._over = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="beside")

    def _run(self) -> None:
        try:
            while not self._over.is_set():
                started = time.perf_counter()
                self.results.append(self._work())
                self._over.wait(max(0.0, started + self._pace - time.perf_counter()))
        except Exception as error:
            self._error = error

    def __enter__(self) -> "_Beside[T]":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        if self._error is not None:
            raise self._error


def _write_seconds(path: Path, data: bytearray) -> float:
    """To write `data` into a new file and sync it."""
    view = memoryview(data)
    started = time.perf_counter()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        for start in range(0, len(view), _PIECE):
            os.write(fd, view[start : start + _PIECE])
        os.fsync(fd)
    finally:
        os.close(fd)
    seconds = time.perf_counter() - started
    path.unlink()
    return seconds


def _summary(
    times: list[UploadTime],
    before: Mapping[str, tuple[float, float]],
    after: Mapping[str, tuple[float, float]],
    megabytes: float,
) -> dict[str, Any]:
    phases = {}
    for phase in PHASES:
        count, seconds = (late - early for late, early in zip(after[phase], before[phase], strict=True))
        phases[phase] = seconds / max(1.0, count)
    accepted = statistics.median(one.accepted for one in times)
    return {
        "uploads": len(times),
        "seconds": accepted,
        "sent_seconds": statistics.median(one.sent for one in times),
        "phase_seconds": phases,
        "mb_s": megabytes / accepted,
        "receive_mb_s": megabytes / phases["receive"] if phases["receive"] else 0.0,
    }


def _gaps(result: LoadResult) -> list[float]:
    return [gap for outcome in result.good for gap in outcome.gaps]


def _spread(gaps: list[float]) -> dict[str, float]:
    """Milliseconds."""
    cuts = statistics.quantiles(gaps, n=100, method="inclusive")
    return {"p50": cuts[49] * 1e3, "p99": cuts[98] * 1e3, "max": max(gaps) * 1e3, "count": len(gaps)}
