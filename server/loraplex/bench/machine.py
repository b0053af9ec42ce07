"""MachineLimits: how fast this machine reads memory and multiplies matrices, measured in a few seconds.

They are the denominators of every share that the benchmarks print. Reading is a float32 matrix times a vector (a batch
of one does the same), over a buffer larger than the last-level cache where that is known; multiplying is the product
that serves the base (`model.linear`). Each figure is the best of several repetitions: a limit is what the machine can
do, so a disturbed repetition says nothing. Memory is read as often as a model's weights are, so what a cache shared
with other machines still holds is counted too; `cache_bytes` and `buffer_bytes` say how much that can be.
"""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from loraplex.model.linear import make_product

MIB = 1 << 20
MIN_BUFFER_BYTES, MAX_BUFFER_BYTES = 512 * MIB, 1024 * MIB
_ROW = 1024
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineLimits:
    """bytes_per_second    read from memory, by number of threads (of a GPU: under 1)
    flops                  multiplications and additions a second in a product of matrices, by dtype, on `threads`
    threads                compute threads of the benchmark; the shares are taken of its limits
    buffer_bytes           what was read; cache_bytes: the last-level cache that the system reports, 0 when unknown
    seconds                what measuring took
    """

    device: str
    threads: int
    bytes_per_second: Mapping[int, float]
    flops: Mapping[str, float]
    buffer_bytes: int
    cache_bytes: int
    seconds: float

    @property
    def bandwidth(self) -> float:
        """Bytes a second on the benchmark's threads."""
        return self.bytes_per_second[self.threads]

    @property
    def is_beyond_cache(self) -> bool:
        return self.buffer_bytes > self.cache_bytes

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        values["bytes_per_second"] = {str(threads): value for threads, value in self.bytes_per_second.items()}
        return values


def measure_limits(
    device: torch.device | str = "cpu",
    threads: int = 1,
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32),
    *,
    buffer_bytes: int | None = None,
    seconds_each: float = 0.4,
) -> MachineLimits:
    """Measure. `buffer_bytes` None: twice the last-level cache, between 512 MiB and 1 GiB. `seconds_each`: how long one
    figure is repeated. Sets torch's number of threads while it runs."""
    started = time.perf_counter()
    device = torch.device(device)
    cache_bytes = last_level_cache_bytes() if device.type == "cpu" else 0
    if buffer_bytes is None:
        buffer_bytes = min(max(2 * cache_bytes, MIN_BUFFER_BYTES), MAX_BUFFER_BYTES)
    buffer_bytes -= buffer_bytes % (4 * _ROW)
    before = torch.get_num_threads()
    counts = sorted({1, threads, os.cpu_count() or 1}) if device.type == "cpu" else [threads]
    try:
        matrix = torch.ones(buffer_bytes // 4, dtype=torch.float32, device=device).view(-1, _ROW)
        reads = {count: buffer_bytes / _read_seconds(matrix, count, seconds_each) for count in counts}
        del matrix
        torch.set_num_threads(threads)
        flops = {str(dtype).removeprefix("torch."): _flops(dtype, device, seconds_each) for dtype in dtypes}
    finally:
        torch.set_num_threads(before)
    return MachineLimits(
        device=str(device),
        threads=threads,
        bytes_per_second=reads,
        flops=flops,
        buffer_bytes=buffer_bytes,
        cache_bytes=cache_bytes,
        seconds=time.perf_counter() - started,
    )


def last_level_cache_bytes() -> int:
    """The largest cache of the first core, 0 when the system does not tell (Linux's sysfs does)."""
    sizes = [0]
    for path in _CACHES.glob("index*/size"):
        text = path.read_text(encoding="ascii").strip()
        factor = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 0)
        if factor and text[:-1].isdigit():
            sizes.append(int(text[:-1]) * factor)
    return max(sizes)


@torch.inference_mode()
def _read_seconds(matrix: torch.Tensor, threads: int, seconds: float) -> float:
    """Seconds to read `matrix` once."""
    torch.set_num_threads(threads)
    vector = torch.ones(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
    return _best(lambda: torch.mv(matrix, vector), matrix.device, seconds)


@torch.inference_mode()
def _flops(dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    rows, size = (512, 2048) if device.type == "cpu" else (4096, 8192)
    weight = torch.randn(size, size, device=device).to(dtype)
    x = torch.randn(rows, size, device=device).to(dtype)
    product = make_product(weight, None)
    return 2 * rows * size * size / _best(lambda: product(x), device, seconds)


def _best(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Seconds of the fastest of at least three repetitions."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    work()
    wait()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        started = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - started)
    return min(times)
