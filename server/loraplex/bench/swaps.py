"""SwapBench: what adapters that come onto the device cost the requests that are decoding there.

A whole engine in this process. Some sequences decode all the time, each adapter in a place of its own; beside them
short requests come one after the other. In the one half they name adapters that stand in places already, in the other
each names the next of many, so that every one turns another out. The halves take turns; compared is the time between
the tokens of the sequences that decode. All adapters are in RAM once the first, uncounted round is over.

Needs cachetools beside torch and transformers, as the engine does; no fastapi, pydantic or SQLAlchemy.
"""

import itertools
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from loraplex.bench.random_model import random_adapter, random_llama
from loraplex.engine.config import EngineConfig
from loraplex.engine.copy_stream import CudaCopyStream
from loraplex.engine.engine import Engine
from loraplex.engine.messages import AdapterUse, EngineRequest
from loraplex.engine.runner import ModelRunner
from loraplex.engine.sampling_params import SamplingParams
from loraplex.lora.weights import LoRAWeights, aligned
from loraplex.model.devices import choose_device, choose_dtype, set_threads
from loraplex.model.loader import measure_geometry, wrap_model

BLOCK_SIZE = 16
SHORT_TOKENS = 4
_PROMPT_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapSettings:
    """steady    sequences that decode all the time, and their adapters
    others       adapters that come in turn, through `spare` places
    tokens       of each steady sequence in one half
    rounds       of both halves; the first is thrown away
    """

    steady: int = 32
    steady_adapters: int = 8
    others: int = 64
    spare: int = 4
    tokens: int = 128
    rounds: int = 4
    rank: int = 16
    context: int = 1024
    dtype: str = "auto"
    device: str = "auto"
    threads: int = 1
    graphs: bool = False
    shape: Mapping[str, Any] = field(default_factory=dict)


class SwapBench:
    def __init__(self, settings: SwapSettings):
        self._settings = settings
        device = choose_device(settings.device)
        dtype = choose_dtype(settings.dtype, device)
        set_threads(settings.threads, device)
        base = wrap_model(random_llama(dtype, device, **settings.shape), device)
        shapes = list(base.targets.values())
        count = settings.steady_adapters + settings.others
        adapters = [random_adapter(shapes, settings.rank, seed, dtype) for seed in range(count)]
        is_cuda = device.type == "cuda"
        if is_cuda:  # as the server's arena has them
            adapters = [replace(weights, slab=weights.slab.pin_memory()) for weights in adapters]
        self._weights: dict[str, LoRAWeights] = {weights.digest: weights for weights in adapters}
        self._uses = [AdapterUse(weights.digest, weights.nbytes) for weights in adapters]
        length = settings.context + settings.tokens + BLOCK_SIZE
        blocks = -(-length // BLOCK_SIZE)
        config = EngineConfig(
            max_num_seqs=settings.steady + settings.spare,
            max_num_batched_tokens=max(2048, settings.steady + settings.spare),
            max_model_len=blocks * BLOCK_SIZE,
            block_size=BLOCK_SIZE,
            num_blocks=blocks * (settings.steady + settings.spare),
            max_loras=settings.steady_adapters + settings.spare,
            adapter_cache_bytes=sum(weights.nbytes for weights in adapters) + 1,
            place_bytes=aligned(adapters[0].nbytes) if is_cuda else 0,
            graph_rank=settings.rank if settings.graphs else None,
        )
        runner = ModelRunner(base, measure_geometry(base.model), config)
        runner.capture_graphs()
        self._device = device
        self._vocab_size = base.vocab_size
        self.adapter_bytes = adapters[0].nbytes
        stream = CudaCopyStream(device) if is_cuda else None
        self._engine = Engine(runner, lambda digest, _: self._weights[digest], stream=stream)
        self._numbers = itertools.count()

    def run(self) -> dict[str, Any]:
        """{"settings", "adapter_bytes", "gaps_ms": {"standing", "coming"}, "ratio_p99", "copies", "copy_ms"}."""
        settings = self._settings
        gaps: dict[str, list[float]] = {"standing": [], "coming": []}
        copied = {"standing": 0, "coming": 0}
        standing = self._uses[settings.steady_adapters :][: settings.spare]
        coming = self._uses[settings.steady_adapters :]
        for turn in range(settings.rounds):
            for name, uses in (("standing", standing), ("coming", coming)):
                self._bring(self._uses[: settings.steady_adapters] + standing)  # as many as there are places
                before = self._engine.runner.pool.copies.counts.count
                found = self._half(itertools.cycle(uses))
                if turn:
                    gaps[name] += found
                    copied[name] += self._engine.runner.pool.copies.counts.count - before
        spread = {name: _spread(values) for name, values in gaps.items()}
        return {
            "settings": asdict(settings) | {"shape": dict(settings.shape)},
            "adapter_bytes": self.adapter_bytes,
            "gaps_ms": spread,
            "ratio_p99": spread["coming"]["p99"] / spread["standing"]["p99"],
            "copies": copied,
            "copy_ms": 1e3 * self._copy_seconds(),
        }

    def close(self) -> None:
        self._engine.close()

    def _bring(self, uses: list[AdapterUse]) -> None:
        """Have these in places."""
        left = {self._add(_PROMPT_TOKENS, 1, use) for use in uses}
        while left:
            left -= {one.seq_id for one in self._engine.step().outputs}

    def _half(self, uses: Iterator[AdapterUse]) -> list[float]:
        """Seconds between the tokens of the steady sequences while short requests name `uses` in turn."""
        settings, engine = self._settings, self._engine
        steady = [
            self._add(settings.context, settings.tokens, self._uses[i % settings.steady_adapters])
            for i in range(settings.steady)
        ]
        last: dict[str, float] = {}
        gaps: list[float] = []
        left, short = set(steady), ""
        while left:
            if len(last) == len(steady) and not short:  # all decode: from here on others come
                short = self._add(_PROMPT_TOKENS, SHORT_TOKENS, next(uses))
            output = engine.step()
            now = time.perf_counter()
            for one in output.outputs:
                assert one.failure is None, one.failure
                if one.seq_id in left:
                    if len(last) == len(steady):
                        gaps.append(now - last[one.seq_id])
                    last[one.seq_id] = now
                if one.finish_reason is not None:
                    left.discard(one.seq_id)
                    short = "" if one.seq_id == short else short
            if engine.is_stalled:
                time.sleep(1e-4)
        if short:
            engine.abort(short)
        return gaps

    def _add(self, length: int, max_tokens: int, use: AdapterUse) -> str:
        number = next(self._numbers)
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(self._vocab_size, (length,), generator=generator).tolist()
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        request = EngineRequest(seq_id=str(number), token_ids=tuple(ids), params=params, composition=(use,))
        refused = self._engine.add(request)
        assert refused is None, refused
        return request.seq_id

    def _copy_seconds(self) -> float:
        """Of an adapter from RAM into a place, until the device has it; the median over the spare ones."""
        times = []
        pool, place = self._engine.runner.pool, self._engine.runner.probe_place
        wait = torch.cuda.synchronize if self._device.type == "cuda" else lambda: None
        for use in self._uses[-8:]:
            wait()
            started = time.perf_counter()
            pool.load(place, self._weights[use.digest])
            wait()
            times.append(time.perf_counter() - started)
            pool.clear(place)
        return statistics.median(times)


def _spread(seconds: list[float]) -> dict[str, float]:
    """Milliseconds."""
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {"p50": 1e3 * cuts[49], "p99": 1e3 * cuts[98], "max": 1e3 * max(seconds), "count": len(seconds)}
