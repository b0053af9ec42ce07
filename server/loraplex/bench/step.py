"""StepBench: how long a decode step takes, with and without adapters, on a random Llama of 124.7 M parameters.

All variants of a batch size take turns within each round, so a slow moment of the machine hits all of them; a figure
is the median over the rounds. Imports without fastapi, pydantic, SQLAlchemy and cachetools: it runs on a bare GPU
machine, too.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from loraplex.engine.config import EngineConfig
from loraplex.engine.messages import AdapterUse, EngineRequest
from loraplex.engine.runner import ModelRunner
from loraplex.engine.sampling_params import SamplingParams
from loraplex.engine.scheduled_batch import ScheduledBatch, ScheduledSequence
from loraplex.engine.sequence import Sequence
from loraplex.lora.weights import LoRAPair, LoRAWeights, ModuleShape, pack
from loraplex.model.devices import choose_device, choose_dtype, set_threads
from loraplex.model.loader import measure_geometry, wrap_model

BATCHES = (1, 8, 32)
ADAPTERS = (0, 1, 8, 32)
BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class StepSettings:
    rounds: int = 12
    context: int = 64
    dtype: str = "auto"
    device: str = "auto"
    threads: int = 1
    rank: int = 16


class StepBench:
    def __init__(self, settings: StepSettings):
        self._settings = settings
        device = choose_device(settings.device)
        dtype = choose_dtype(settings.dtype, device)
        set_threads(settings.threads, device)
        self._base = wrap_model(_random_llama(dtype), device)
        geometry = measure_geometry(self._base.model)
        blocks_each = (settings.context + settings.rounds * 8) // BLOCK_SIZE + 2
        self._config = EngineConfig(
            max_num_seqs=max(BATCHES),
            max_num_batched_tokens=512,
            max_model_len=blocks_each * BLOCK_SIZE,
            block_size=BLOCK_SIZE,
            num_blocks=blocks_each * max(BATCHES),
            max_loras=max(ADAPTERS),
        )
        self._blocks_each = blocks_each
        self._runner = ModelRunner(self._base, geometry, self._config)
        warm_up = getattr(self._runner.ops, "warm_up", None)
        if warm_up is not None:
            warm_up(dtype)
        self._weights = [
            _random_adapter(self._base.targets, settings.rank, seed, dtype) for seed in range(max(ADAPTERS))
        ]
        for place, weights in enumerate(self._weights):
            self._runner.pool.load(place, weights)

    def run(self, on_round: Callable[[], object] = lambda: None) -> dict:
        """{"rows": [...], "ratios": {...}}; see `loraplex bench step --json`."""
        seconds: dict[tuple[int, int], list[float]] = {}
        for batch in BATCHES:
            variants = [count for count in ADAPTERS if count <= batch]
            batches = {count: self._make_batch(batch, count) for count in variants}
            for _ in range(2):
                for scheduled in batches.values():
                    self._timed_step(scheduled)
            for _ in range(self._settings.rounds):
                for count, scheduled in batches.items():
                    seconds.setdefault((batch, count), []).append(self._timed_step(scheduled))
                on_round()
        rows = [
            {
                "batch": batch,
                "adapters": count,
                "step_ms": 1e3 * statistics.median(times),
                "step_ms_min": 1e3 * min(times),
                "tokens_per_second": batch / statistics.median(times),
            }
            for (batch, count), times in seconds.items()
        ]
        rate = {(row["batch"], row["adapters"]): row["tokens_per_second"] for row in rows}
        return {
            "shape": f"llama {self._base.num_parameters / 1e6:.1f} M, {self._base.dtype}, {self._base.device}, "
            f"{self._settings.threads} threads, rank {self._settings.rank}, context {self._settings.context}",
            "rows": rows,
            "base": {str(batch): rate[batch, 0] for batch in BATCHES},
            "ratios": {
                "distinct_32_of_32": rate[32, 32] / rate[32, 0],
                "distinct_8_of_8": rate[8, 8] / rate[8, 0],
                "single_batch_1": rate[1, 1] / rate[1, 0],
                "single_batch_8": rate[8, 1] / rate[8, 0],
                "single_batch_32": rate[32, 1] / rate[32, 0],
            },
        }

    def _make_batch(self, batch: int, num_adapters: int) -> list[ScheduledSequence]:
        """`batch` sequences with their context in the cache, adapters dealt out in runs as the scheduler would."""
        places = sorted(i % num_adapters for i in range(batch)) if num_adapters else [-1] * batch
        generator = torch.Generator().manual_seed(batch)
        entries = []
        for index, place in enumerate(places):
            weights = self._weights[place]
            composition = () if place < 0 else (AdapterUse(weights.digest, weights.nbytes),)
            ids = torch.randint(self._base.vocab_size, (self._settings.context,), generator=generator).tolist()
            params = SamplingParams(temperature=0.0, max_tokens=1 << 20)
            seq = Sequence(
                EngineRequest(seq_id=str(index), token_ids=tuple(ids), params=params, composition=composition), index
            )
            seq.block_table = list(range(index * self._blocks_each, (index + 1) * self._blocks_each))
            entries.append(ScheduledSequence(seq, 1, () if place < 0 else (place,)))
        self._prefill(entries)
        return entries

    def _prefill(self, entries: list[ScheduledSequence]) -> None:
        for entry in entries:
            while entry.seq.num_new_tokens > 1:
                count = min(entry.seq.num_new_tokens - 1, self._config.max_num_batched_tokens)
                chunk = ScheduledSequence(entry.seq, count, entry.places)
                self._runner.execute(ScheduledBatch(0, (chunk,), ()))
                entry.seq.num_computed_tokens += count

    def _timed_step(self, entries: list[ScheduledSequence]) -> float:
        """Seconds of one decode step, the sampled tokens on the host included."""
        batch = ScheduledBatch(0, tuple(entries), ())
        started = time.perf_counter()
        results = self._runner.execute(batch)
        seconds = time.perf_counter() - started
        for entry, result in zip(entries, results, strict=True):
            assert result.token_id is not None
            entry.seq.token_ids.append(result.token_id)
            entry.seq.num_computed_tokens += 1
        return seconds


def _random_llama(dtype: torch.dtype):
    """124.7 M parameters: the shape of DESIGN's CPU bars."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        initializer_range=0.03,
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def _random_adapter(targets: dict[str, ModuleShape], rank: int, seed: int, dtype: torch.dtype) -> LoRAWeights:
    generator = torch.Generator().manual_seed(seed)
    pairs = [
        LoRAPair(
            shape,
            torch.randn(rank, shape.in_features, generator=generator) * 0.02,
            torch.randn(shape.out_features, rank, generator=generator) * 0.04,
            2.0,
        )
        for shape in targets.values()
        if shape.kind == "linear"
    ]
    return pack(f"{seed:064x}", pairs, dtype)
