"""StepBench: how long a step takes, with and without adapters, on a random Llama of 124.7 M parameters.

All variants of a batch size take turns within each round, so a slow moment of the machine hits all of them; a figure
is the median over the rounds. Sequences of different variants stand in the same KV blocks: what the cache holds does
not matter to the time. Imports without fastapi, pydantic, SQLAlchemy, httpx2, rich and cachetools: it runs on a bare
GPU machine, too.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from loraplex.bench.lora_calls import CountedOps
from loraplex.bench.machine import MachineLimits, measure_limits
from loraplex.bench.random_model import random_adapter, random_llama
from loraplex.bench.roofline import ModelCost, StepCost
from loraplex.engine.config import EngineConfig
from loraplex.engine.messages import AdapterUse, EngineRequest
from loraplex.engine.runner import ModelRunner
from loraplex.engine.sampling_params import SamplingParams
from loraplex.engine.scheduled_batch import ScheduledBatch, ScheduledSequence
from loraplex.engine.sequence import Sequence
from loraplex.lora.weights import LoRAWeights
from loraplex.model.devices import choose_device, choose_dtype, set_threads
from loraplex.model.loader import BaseModel, load_base, measure_geometry, wrap_model
from loraplex.model.merged import merge
from loraplex.ops import select_ops

BLOCK_SIZE = 16
BAR_RANK = 16
WARM_UP_ROUNDS = 2
_DISTINCT_PROMPTS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSettings:
    """batches, adapters   every pair of them with adapters <= batch is a variant; 0 adapters: the base alone
    ranks                  every variant with adapters runs once for each; the ratios are of rank 16, or the first
    context                tokens behind each sequence of a decode step
    merged                 each batch also as one adapter's own on its merged weights
    prefill                tokens of a prefill step, 0: none is measured
    quantization           of the base: a kind of `model.quantization.KINDS`; limits stay those of unquantised weights
    graphs                 steps of decoding run as CUDA graphs; calls into LoRA's ops are not counted then
    shape                  changes to the model's config
    """

    rounds: int = 12
    batches: tuple[int, ...] = (1, 8, 32, 64)
    adapters: tuple[int, ...] = (0, 1, 8, 32, 64)
    ranks: tuple[int, ...] = (BAR_RANK,)
    merged: bool = True
    context: int = 64
    prefill: int = 512
    dtype: str = "auto"
    device: str = "auto"
    threads: int = 1
    quantization: str | None = None
    graphs: bool = False
    shape: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bar_rank(self) -> int:
        return BAR_RANK if BAR_RANK in self.ranks else self.ranks[0]


@dataclass(frozen=True, slots=True)
class Variant:
    """`batch` sequences dealt out to `adapters` distinct ones of `rank`; 0 and 0: the base alone. `merged`: all are one
    adapter's, on its merged weights."""

    batch: int
    adapters: int
    rank: int
    merged: bool = False


@dataclass(slots=True)
class Timing:
    """Seconds of every round; calls into LoRA's ops in one step."""

    entries: list[ScheduledSequence]
    seconds: list[float]
    lora_ops: int = 0


class StepBench:
    def __init__(self, settings: StepSettings, limits: MachineLimits | None = None):
        """`limits` None: measured here, which takes a few seconds."""
        self._settings = settings
        device = choose_device(settings.device)
        dtype = choose_dtype(settings.dtype, device)
        threads = set_threads(settings.threads, device)
        self.limits = limits or measure_limits(device, threads, _dtypes(dtype))
        self._base = self._make_base(dtype, device)
        geometry = measure_geometry(self._base.model)
        self._cost = ModelCost.of(self._base.model, self._base.targets, geometry, dtype)
        self._blocks_each = -(-(settings.context + settings.rounds + WARM_UP_ROUNDS + 1) // BLOCK_SIZE)
        largest = max(settings.batches)
        places = max(1, max(settings.adapters) * len(settings.ranks))
        tokens = max(512, settings.prefill, largest)
        self._config = EngineConfig(
            max_num_seqs=max(largest, _DISTINCT_PROMPTS),
            max_num_batched_tokens=tokens,
            max_model_len=max(self._blocks_each * BLOCK_SIZE, settings.prefill),
            block_size=BLOCK_SIZE,
            num_blocks=max(self._blocks_each * largest, tokens // BLOCK_SIZE + _DISTINCT_PROMPTS),
            max_loras=places + self._is_merging,
            graph_rank=max(settings.ranks) if settings.graphs else None,
        )
        self._ops = CountedOps(select_ops(device))
        self._runner = ModelRunner(self._base, geometry, self._config, self._ops)  # type: ignore[arg-type]
        warm_up = getattr(self._runner.ops, "warm_up", None)
        if warm_up is not None:
            warm_up(dtype)
        self._runner.capture_graphs()
        shapes = list(self._base.targets.values())
        seeds = range(max(settings.adapters))
        self._weights: list[LoRAWeights] = [
            random_adapter(shapes, rank, seed, dtype) for rank in settings.ranks for seed in seeds
        ]
        if self._is_merging:  # an adapter of its own: what is merged runs so whenever it is alone
            own = random_adapter(shapes, settings.bar_rank, len(self._weights), dtype)
            self._runner.install(merge(self._base, own, self._runner.ops))
            self._weights.append(own)
        for place, weights in enumerate(self._weights):
            self._runner.pool.load(place, weights)

    def _make_base(self, dtype: torch.dtype, device: torch.device) -> BaseModel:
        model = random_llama(dtype, device, **self._settings.shape)
        if self._settings.quantization is None:
            return wrap_model(model, device)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            return load_base(folder, dtype, device, self._settings.quantization)

    @property
    def _is_merging(self) -> bool:
        """Nothing is merged into a quantised base."""
        return self._settings.merged and self._settings.quantization is None

    @property
    def num_rounds(self) -> int:
        """How often `run` calls `on_round`."""
        return self._settings.rounds * (len(self._settings.batches) + bool(self._settings.prefill))

    def run(self, on_round: Callable[[], object] = lambda: None) -> dict[str, Any]:
        """Measure. The result is what `loraplex bench step --json` prints: shape, machine, rows, prefill, base, ratios.

        A row's `limit_ms` is the roofline's time, `share_of_bandwidth` and `share_of_flops` what the step reaches of
        the machine's measured limits; the larger of the two is what bounds it.
        """
        settings = self._settings
        timings: dict[Variant, Timing] = {}
        for batch in settings.batches:
            variants = {variant: Timing(self._make_batch(variant), []) for variant in self._variants(batch)}
            self._take_turns(variants, on_round, advance=True)
            timings |= variants
        prompts = {variant: Timing(self._make_prompts(variant), []) for variant in self._prompt_variants()}
        self._take_turns(prompts, on_round, advance=False)
        rows = [self._decode_row(variant, timing) for variant, timing in timings.items()]
        prefill = [self._prefill_row(variant, timing) for variant, timing in prompts.items()]
        rate = {
            (row["batch"], row["adapters"], row["rank"]): row["tokens_per_second"] for row in rows if not row["merged"]
        }
        for row in rows:
            base = rate.get((row["batch"], 0, 0))
            row["ratio_to_base"] = None if base is None else row["tokens_per_second"] / base
        return {
            "shape": f"llama {self._base.num_parameters / 1e6:.1f} M, {self._base.dtype}, {self._base.device}, "
            f"{settings.threads} threads, rank {', '.join(map(str, settings.ranks))}, context {settings.context}",
            "machine": self.limits.to_json(),
            "quantization": None if self._base.quantization is None else asdict(self._base.quantization),
            "rows": rows,
            "prefill": prefill,
            "base": {str(batch): rate[batch, 0, 0] for batch in settings.batches if (batch, 0, 0) in rate},
            "ratios_rank": settings.bar_rank,
            "ratios": self._ratios(rows, prefill),
        }

    # -- variants ---------------------------------------------------------------------------------------------

    def _variants(self, batch: int) -> list[Variant]:
        settings = self._settings
        base = [Variant(batch, 0, 0)] if 0 in settings.adapters else []
        counts = [count for count in settings.adapters if 0 < count <= batch]
        merged = [Variant(batch, 1, settings.bar_rank, True)] if self._is_merging else []
        return base + [Variant(batch, count, rank) for rank in settings.ranks for count in counts] + merged

    def _prompt_variants(self) -> list[Variant]:
        """One prompt and eight shorter ones: the base, and as many adapters as prompts."""
        settings, rank = self._settings, self._settings.bar_rank
        if not settings.prefill:
            return []
        variants = []
        for count in (1, _DISTINCT_PROMPTS):
            if settings.prefill // count:
                variants += [Variant(count, 0, 0)] if 0 in settings.adapters else []
                variants += [Variant(count, count, rank)] if count <= max(settings.adapters) else []
        return variants

    def _places(self, variant: Variant) -> list[int]:
        """The pool place of each sequence's adapter, in runs as the scheduler orders them; -1: none."""
        if not variant.adapters:
            return [-1] * variant.batch
        if variant.merged:
            return [len(self._weights) - 1] * variant.batch
        first = self._settings.ranks.index(variant.rank) * max(self._settings.adapters)
        return sorted(first + i % variant.adapters for i in range(variant.batch))

    def _make_batch(self, variant: Variant) -> list[ScheduledSequence]:
        """Sequences with their context in the cache."""
        entries = []
        for index, place in enumerate(self._places(variant)):
            seq = self._sequence(index, place, self._settings.context)
            seq.block_table = list(range(index * self._blocks_each, (index + 1) * self._blocks_each))
            entries.append(ScheduledSequence(seq, 1, () if place < 0 else (place,)))
        for entry in entries:
            while entry.seq.num_new_tokens > 1:
                count = min(entry.seq.num_new_tokens - 1, self._config.max_num_batched_tokens)
                chunk = ScheduledSequence(entry.seq, count, entry.places)
                self._runner.execute(ScheduledBatch(0, (chunk,), ()))
                entry.seq.num_computed_tokens += count
        return entries

    def _make_prompts(self, variant: Variant) -> list[ScheduledSequence]:
        """Whole prompts that share the tokens of one prefill step."""
        length = self._settings.prefill // variant.batch
        blocks = -(-length // BLOCK_SIZE)
        entries = []
        for index, place in enumerate(self._places(variant)):
            seq = self._sequence(index, place, length)
            seq.block_table = list(range(index * blocks, (index + 1) * blocks))
            entries.append(ScheduledSequence(seq, length, () if place < 0 else (place,)))
        return entries

    def _sequence(self, index: int, place: int, length: int) -> Sequence:
        composition = ()
        if place >= 0:
            composition = (AdapterUse(self._weights[place].digest, self._weights[place].nbytes),)
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(self._base.vocab_size, (length,), generator=generator).tolist()
        params = SamplingParams(temperature=0.0, max_tokens=1 << 20)
        return Sequence(
            EngineRequest(seq_id=str(index), token_ids=tuple(ids), params=params, composition=composition), index
        )

    # -- time -------------------------------------------------------------------------------------------------

    def _take_turns(self, timings: dict[Variant, Timing], on_round: Callable[[], object], *, advance: bool) -> None:
        if not timings:
            return
        for round_index in range(WARM_UP_ROUNDS + self._settings.rounds):
            for timing in timings.values():
                calls = self._ops.calls
                seconds = self._timed_step(timing.entries, advance=advance)
                timing.lora_ops = self._ops.calls - calls
                if round_index >= WARM_UP_ROUNDS:
                    timing.seconds.append(seconds)
            if round_index >= WARM_UP_ROUNDS:
                on_round()

    def _timed_step(self, entries: list[ScheduledSequence], *, advance: bool = True) -> float:
        """Seconds of one step, the sampled tokens on the host included. `advance`: they join their sequences."""
        batch = ScheduledBatch(0, tuple(entries), ())
        started = time.perf_counter()
        results = self._runner.execute(batch)
        seconds = time.perf_counter() - started
        for entry, result in zip(entries, results, strict=True):
            assert result.token_id is not None
            if advance:
                entry.seq.token_ids.append(result.token_id)
                entry.seq.num_computed_tokens += entry.num_new_tokens
        return seconds

    # -- figures ----------------------------------------------------------------------------------------------

    def _decode_row(self, variant: Variant, timing: Timing) -> dict[str, Any]:
        context = self._settings.context + WARM_UP_ROUNDS + self._settings.rounds / 2
        adapters = 0 if variant.merged else variant.adapters  # a merged one is read as the base's weights are
        cost = self._cost.decode(variant.batch, context, adapters, self._cost.adapter_numel(variant.rank))
        return self._row(variant, timing, cost, variant.batch)

    def _prefill_row(self, variant: Variant, timing: Timing) -> dict[str, Any]:
        length = self._settings.prefill // variant.batch
        cost = self._cost.prefill(variant.batch, length, variant.adapters, self._cost.adapter_numel(variant.rank))
        return self._row(variant, timing, cost, variant.batch * length) | {"tokens": variant.batch * length}

    def _row(self, variant: Variant, timing: Timing, cost: StepCost, tokens: int) -> dict[str, Any]:
        seconds = statistics.median(timing.seconds)
        bandwidth, flop_rate = self.limits.bandwidth, self.limits.flops[_name(self._base.dtype)]
        limit = cost.seconds(bandwidth, flop_rate)
        return {
            "batch": variant.batch,
            "adapters": variant.adapters,
            "rank": variant.rank,
            "merged": variant.merged,
            "step_ms": 1e3 * seconds,
            "step_ms_min": 1e3 * min(timing.seconds),
            "tokens_per_second": tokens / seconds,
            "bytes": cost.nbytes,
            "flops": cost.flops,
            "limit_ms": 1e3 * limit,
            "share_of_bandwidth": cost.nbytes / bandwidth / seconds,
            "share_of_flops": cost.flops / flop_rate / seconds,
            "share_of_limit": limit / seconds,
            "lora_ops": timing.lora_ops,
        }

    def _ratios(self, rows: list[dict[str, Any]], prefill: list[dict[str, Any]]) -> dict[str, float]:
        """Those whose variants were measured, at the bar's rank."""
        rank = self._settings.bar_rank
        found = {(row["batch"], row["adapters"]): row for row in rows if row["rank"] in (0, rank) and not row["merged"]}
        ratios = {}
        for batch in self._settings.batches:
            for name, count in ((f"distinct_{batch}_of_{batch}", batch), (f"single_batch_{batch}", 1)):
                is_single = name.startswith("single") or batch > 1
                if is_single and (batch, count) in found and (batch, 0) in found:
                    ratios[name] = found[batch, count]["ratio_to_base"]
        for row in rows:
            if row["merged"] and row["ratio_to_base"] is not None:
                ratios[f"merged_batch_{row['batch']}"] = row["ratio_to_base"]
        if (1, 0) in found:
            ratios["base_share_of_bandwidth_batch_1"] = found[1, 0]["share_of_bandwidth"]
        base_rows = [row for row in rows + prefill if not row["adapters"]]
        if base_rows:
            ratios["lora_ops_in_base_only_step"] = max(row["lora_ops"] for row in base_rows)
        rate = {(row["batch"], row["adapters"]): row["tokens_per_second"] for row in prefill}
        for count in (1, _DISTINCT_PROMPTS):
            if (count, 0) in rate and (count, count) in rate:
                ratios[f"prefill_{count}_of_{count}"] = rate[count, count] / rate[count, 0]
        return ratios


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    return tuple(dict.fromkeys((dtype, torch.bfloat16, torch.float32)))
