"""Engine: schedule, execute, update, emit. Synchronous; one thread; no asyncio, names or text."""

import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from loraplex.engine.adapter_cache import AdapterCache
from loraplex.engine.adapter_copies import AdapterCopies
from loraplex.engine.adapter_ledger import AdapterLedger
from loraplex.engine.adapter_loads import AdapterLoads, ReadAdapter
from loraplex.engine.adapter_merges import AdapterMerges, MergeStatus
from loraplex.engine.adapter_places import AdapterPlaces
from loraplex.engine.adapter_proofs import AdapterProofs
from loraplex.engine.adapter_residency import AdapterResidency
from loraplex.engine.adapter_swaps import AdapterSwaps
from loraplex.engine.block_manager import BlockManager
from loraplex.engine.config import EngineConfig
from loraplex.engine.copy_stream import CopyStream
from loraplex.engine.device_errors import describe, is_device_error, is_out_of_memory, let_go
from loraplex.engine.durations import DurationCounts, Durations
from loraplex.engine.eviction import eviction_policy
from loraplex.engine.memory import free_cached_memory
from loraplex.engine.merge_policy import MergePolicy
from loraplex.engine.messages import (
    Command,
    CommandResult,
    EngineRequest,
    Failure,
    FinishReason,
    SequenceOutput,
    StepOutput,
)
from loraplex.engine.runner import ModelRunner
from loraplex.engine.scheduled_batch import ScheduledBatch
from loraplex.engine.scheduler import Scheduler
from loraplex.engine.sequence import Sequence

MAX_FAILED_STEPS = 3


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot for metrics and the start panel. Counters grow for the life of the process."""

    num_running: int
    num_waiting: int
    kv_usage: float
    num_preemptions: int
    prefix_queries: int
    prefix_hits: int
    num_steps: int
    num_generated: int
    ram_bytes: int
    ram_budget: int
    num_loads: int
    num_ram_evictions: int
    ram_digests: tuple[str, ...]
    device_digests: tuple[str, ...]
    waiting_digests: tuple[str, ...]
    load_seconds: Mapping[str, DurationCounts]  # of an adapter's way: "disk", "convert", "copy" (into its place)
    max_distinct_adapters: int  # most adapters that ran in one step so far
    merges: tuple[MergeStatus, ...]
    num_merged_steps: int


class EngineDied(Exception):
    """The engine cannot go on: three failed steps in a row, a device error or broken bookkeeping."""


class Engine:
    def __init__(
        self,
        runner: ModelRunner,
        read_adapter: ReadAdapter,
        on_load: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        stream: CopyStream | None = None,
    ):
        """`stream`: copies adapters into places beside the steps; None: the step that first uses one puts it there."""
        config = runner.config
        self.config: EngineConfig = config
        self.runner = runner
        self.loads = AdapterLoads(read_adapter, config.max_concurrent_loads, on_load)
        self.places = AdapterPlaces(config.max_loras)
        self.cache = AdapterCache(
            config.adapter_cache_bytes, self._forget_place, eviction_policy(config.eviction), AdapterLedger(clock)
        )
        self.blocks = BlockManager(config.num_blocks, config.block_size)
        self.copies = None if stream is None else AdapterCopies(runner.pool, stream)
        swaps = None
        if self.copies is not None:
            swaps = AdapterSwaps(self.cache, self.places, self.copies, config.max_concurrent_copies)
        self.scheduler = Scheduler(config, self.cache, self.places, self.blocks, self.loads, swaps)
        self.proofs = AdapterProofs(runner, self.cache, self.scheduler)
        self.residency = AdapterResidency(self.cache, self.places, runner.pool, self.scheduler, clock)
        policy = MergePolicy() if config.merge == "auto" else None
        self.merges = AdapterMerges(runner, self.cache, self.scheduler, policy, on_load)
        self._sequences: dict[str, Sequence] = {}
        self.last_error: str | None = None  # the traceback of the latest failed step
        self._is_stalled = False
        self._num_failed_steps = 0
        self._num_generated = 0
        self._num_loads = 0
        self._disk, self._convert = Durations(), Durations()
        self._max_distinct = 0

    # -- coming and going -------------------------------------------------------------------------------------

    def add(self, request: EngineRequest) -> SequenceOutput | None:
        """Queue a request; returns the output that ends it when it cannot be served at all."""
        failure = self._refusal(request)
        if failure is not None:
            return SequenceOutput(request.seq_id, finish_reason=FinishReason.ERROR, failure=failure)
        seq = Sequence(request, arrival=0)
        self._sequences[request.seq_id] = seq
        self.scheduler.add(seq)
        return None

    def abort(self, seq_id: str) -> None:
        """End a sequence wherever it is; unknown and finished ones are fine."""
        seq = self._sequences.pop(seq_id, None)
        if seq is not None:
            self.scheduler.abort(seq)

    @property
    def has_work(self) -> bool:
        """Also while a load has ended that nobody waits for any more: untaken, it would answer the next who asks. And
        while a copy is under way: it leases its adapter."""
        is_asked = bool(self._sequences) or self.proofs.has_work or self.merges.has_work or self.residency.has_work
        return is_asked or self.loads.has_finished or self._is_copying

    @property
    def _is_copying(self) -> bool:
        return self.copies is not None and self.copies.is_busy

    @property
    def is_stalled(self) -> bool:
        """Whether the last step ran nothing, so that only a finished load or a message can change anything (or the
        time: a proof that waits has a deadline)."""
        return self._is_stalled

    # -- the step ---------------------------------------------------------------------------------------------

    def step(self) -> StepOutput:
        """One step for everything that can run. Raises EngineDied when it is no use going on."""
        outputs = self._take_loads() + self._take_copies() + self.scheduler.refuse_hopeless()
        seconds = self._run_batch(outputs) if self._sequences else None
        answers = self._prove(seconds) + self.merges.work() + self.residency.work()
        is_proving = self.proofs.has_work and not self.proofs.is_waiting
        is_idle = seconds is None and not outputs and not answers and not is_proving
        if is_idle and self.copies is not None:
            self.copies.wait()
        self._is_stalled = is_idle and not self._is_copying
        return self._emit(outputs, answers)

    def _run_batch(self, outputs: list[SequenceOutput]) -> float | None:
        """Run what can run and add its `outputs`; the seconds it took, None when nothing could."""
        batch = self.scheduler.schedule()
        if not batch.entries:
            return None
        started = time.perf_counter()
        self._max_distinct = max(self._max_distinct, len({p for entry in batch.entries for p in entry.places}))
        try:
            is_merged = self.runner.merged_for(batch) is not None
            results = self.runner.execute(batch)
            self._watch(batch)
            done = self.scheduler.update(batch, results)
            outputs += [replace(output, is_merged=True) for output in done] if is_merged else done
            self._num_failed_steps = 0
        except Exception as error:  # whatever it was: it ends this batch, not the server
            outputs += self._survive(batch, error)
        return time.perf_counter() - started

    def _watch(self, batch: ScheduledBatch) -> None:
        sole = batch.sole_adapter
        self.merges.observe(sole, None if sole is None else batch.entries[0].seq.request.composition[0])

    def _prove(self, step_seconds: float | None) -> list[CommandResult]:
        answers = self.proofs.work(step_seconds)
        if self.proofs.last_error is not None:
            self.last_error, self.proofs.last_error = self.proofs.last_error, None
        return answers

    def _take_loads(self) -> list[SequenceOutput]:
        outputs = []
        for load in self.loads.poll():
            self._num_loads += 1
            if load.weights is not None:
                self._disk.observe(load.disk_seconds)
                self._convert.observe(load.convert_seconds)
            self.proofs.finish_load(load)
            self.merges.finish_load(load)
            self.residency.finish_load(load)
            outputs += self.scheduler.finish_load(load)
        return outputs

    def _take_copies(self) -> list[SequenceOutput]:
        outputs = []
        for copy in self.copies.poll() if self.copies is not None else ():
            self.residency.finish_copy(copy)
            outputs += self.scheduler.finish_copy(copy)
        return outputs

    def _emit(self, outputs: list[SequenceOutput], answers: list[CommandResult]) -> StepOutput:
        for output in outputs:
            self._num_generated += output.token_id is not None
            if output.finish_reason is not None:
                del self._sequences[output.seq_id]
        return StepOutput(self.scheduler.step, tuple(outputs), tuple(answers))

    def _survive(self, batch: ScheduledBatch, error: Exception) -> list[SequenceOutput]:
        self._num_failed_steps += 1
        outputs = self.scheduler.fail(batch, _failure_of(error))
        for place, _ in batch.adapter_loads:
            self.runner.pool.clear(place)
        self.last_error = "".join(traceback.format_exception(error))
        if is_out_of_memory(error):
            let_go(error)  # first, or nothing would be free
            free_cached_memory(self.runner.base.device)
        try:
            self.check_integrity()
        except AssertionError as broken:
            raise EngineDied(f"bookkeeping broke in a failed step: {broken}") from error
        if self._num_failed_steps >= MAX_FAILED_STEPS:
            raise EngineDied(f"{MAX_FAILED_STEPS} steps in a row failed, the last with {describe(error)}") from error
        if is_device_error(error):
            raise EngineDied(f"the device failed: {describe(error)}") from error
        return outputs

    # -- commands and views -----------------------------------------------------------------------------------

    def take(self, command: Command) -> CommandResult | None:
        """Run a command; None: its answer comes with a later step."""
        try:
            if command.name == "prove":
                self.proofs.add(command.command_id, command.arguments["use"], command.arguments["timeout"])
                return None
            if command.name == "merge":
                status = self.merges.add(command.arguments["use"], command.command_id)
                return None if status is None else CommandResult(command.command_id, status)
            if command.name == "bring":
                self.residency.add(command.command_id, **command.arguments)
                return None
            return CommandResult(command.command_id, self.run_command(command.name, command.arguments))
        except (ValueError, KeyError) as error:
            return CommandResult(command.command_id, error=str(error))

    def run_command(self, name: str, arguments: dict[str, Any]) -> Any:
        """A named verb that is done at once, between steps. ValueError for an unknown one."""
        if name == "stats":
            return self.stats()
        if name == "unmerge":
            return self.merges.remove(arguments["digest"])
        if name == "unpin":
            return self.residency.unpin(**arguments)
        if name == "pinned":
            return self.residency.pinned
        if name == "expire":
            return self.residency.expire(**arguments)
        if name == "tiers":
            return self.residency.view()
        if name == "standings":
            return self.residency.standings(**arguments)
        if name == "forget_logits":
            return self.runner.kept_logits.forget(arguments["names"])
        if name == "evict":
            for digest in arguments["digests"]:
                self.merges.forget(digest)
                if not self.cache.num_leases(digest):
                    self.cache.unpin(digest)
                    self.cache.evict(digest)
            return None
        raise ValueError(f"the engine knows no command {name!r}")

    def stats(self) -> EngineStats:
        scheduler = self.scheduler
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            kv_usage=self.blocks.usage,
            num_preemptions=scheduler.num_preemptions,
            prefix_queries=scheduler.num_prefix_queries,
            prefix_hits=scheduler.num_prefix_hits,
            num_steps=scheduler.step,
            num_generated=self._num_generated,
            ram_bytes=int(self.cache.currsize),
            ram_budget=int(self.cache.maxsize),
            num_loads=self._num_loads,
            num_ram_evictions=self.cache.num_evictions,
            ram_digests=tuple(self.cache),
            device_digests=tuple(self.places.arrived),
            waiting_digests=tuple({d for seq in scheduler.waiting for d in seq.digests}),
            load_seconds={
                "disk": self._disk.counts,
                "convert": self._convert.counts,
                "copy": self.runner.pool.copies.counts,
            },
            max_distinct_adapters=self._max_distinct,
            merges=self.merges.statuses,
            num_merged_steps=self.merges.num_merged_steps,
        )

    def check_integrity(self) -> None:
        """Raise AssertionError when any bookkeeping disagrees with itself."""
        self.scheduler.check_integrity()
        self.runner.kept_logits.check_integrity()
        live = {seq.seq_id for seq in self.scheduler.sequences}
        assert live <= set(self._sequences), "a scheduled sequence is unknown to the engine"
        for digest in self.places.arrived:
            place = self.places.place_of(digest)
            assert self.runner.pool.digest_in(place) == digest, f"place {place} does not hold its adapter"
        if self.copies is not None:
            self.copies.check_integrity(self.places.copying)
        self.merges.check_integrity()

    def close(self) -> None:
        self.loads.close()
        self.merges.close()
        if self.copies is not None:
            self.copies.close()

    def _forget_place(self, digest: str) -> None:
        place = self.places.release(digest)
        if place is not None:
            self.runner.pool.clear(place)

    def _refusal(self, request: EngineRequest) -> Failure | None:
        config = self.config
        if request.seq_id in self._sequences:
            return Failure("duplicate_request", f"A sequence {request.seq_id!r} is running already.")
        if not request.token_ids:
            return Failure("invalid_request", "The prompt has no tokens.")
        if len(request.token_ids) + request.params.max_tokens > config.max_model_len:
            return Failure(
                "context_length_exceeded",
                f"This model's maximum context length is {config.max_model_len} tokens; the prompt has "
                f"{len(request.token_ids)} and max_tokens is {request.params.max_tokens}.",
            )
        if len(self.scheduler.waiting) >= config.max_waiting:
            return Failure("overloaded", f"{config.max_waiting} requests are waiting already.")
        digests = [use.digest for use in request.composition]
        if len(set(digests)) != len(digests) or len(digests) > config.max_loras:
            return Failure("invalid_request", f"A composition takes at most {config.max_loras} different adapters.")
        if sum(use.nbytes for use in request.composition) > config.adapter_cache_bytes:
            return Failure(
                "adapter_too_large",
                f"The adapter needs {sum(use.nbytes for use in request.composition)} bytes in RAM and the cache has "
                f"{config.adapter_cache_bytes}; start the server with a larger --adapter-cache-bytes.",
            )
        return None


def _failure_of(error: Exception) -> Failure:
    """What the requests of a step are told that ended with `error`."""
    if is_out_of_memory(error):
        return Failure(
            "insufficient_memory",
            "The device ran out of memory while computing this request and those beside it. Send it again; if that "
            "happens often, start the server with a lower --gpu-memory-utilization (or --kv-cache-bytes), so that more "
            "is left for a step, or with a lower --max-num-batched-tokens, so that a step needs less.",
        )
    return Failure("engine_step_failed", f"The engine failed while computing this request: {describe(error)}.")
