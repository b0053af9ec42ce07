"""StepGraphs: steps of decoding alone, captured once for a size and replayed with what stands in the buffers now.

A graph repeats its launches with the host's numbers as they were; so all that varies from step to step is read from
memory that stays where it is: a batch built for a `Capacity`, the pool's tables on the device, the paged cache. Every
size has a graph for rows of the base alone, without any LoRA kernel, and one for each class of ranks.

Source of the method: CUDA graphs as in nano-vllm and vLLM (one graph a padded batch size, one memory pool for all).
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from loraplex.engine.adapter_pool import AdapterPool
from loraplex.engine.batch import BatchBuffers, Capacity, ForwardBatch
from loraplex.engine.config import EngineConfig
from loraplex.engine.scheduled_batch import ScheduledBatch
from loraplex.model.linear import ROW_MULTIPLE

_LEAST_RANK = 16
"""Kernels take ranks in blocks of 16, 32 or 64: a class of ranks is what they would compute with anyway."""


class Capture(Protocol):
    def __call__(self, call: Callable[[], None]) -> Callable[[], None]:
        """Record what `call` does to the device, in place, and return what does it again. `call` has run once."""
        ...


class CudaCapture:
    """CUDA graphs in one memory pool: they run one after the other, so each may use what the others do."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, call: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # other threads (loads, merges) may use the device meanwhile
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            call()
        return graph.replay


def row_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """The numbers of rows that there are graphs for: doubling from ROW_MULTIPLE, to which every step is padded, up to
    the first that holds `max_num_seqs`."""
    most = -(-max_num_seqs // ROW_MULTIPLE) * ROW_MULTIPLE
    sizes = [ROW_MULTIPLE]
    while sizes[-1] < most:
        sizes.append(min(2 * sizes[-1], most))
    return tuple(sizes)


def rank_sizes(max_rank: int) -> tuple[int, ...]:
    """The ranks that there are graphs for: 0 (the base alone), then doubling up to the first that holds `max_rank`."""
    sizes = [0, _LEAST_RANK]
    while sizes[-1] < max_rank:
        sizes.append(2 * sizes[-1])
    return tuple(sizes)


def capacity_for(batch: ScheduledBatch, pool: AdapterPool, config: EngineConfig) -> Capacity | None:
    """The smallest size that takes the step; None: it is none for a graph. One is for decoding alone, with adapters
    that are deltas on linears and nothing else, none wider than `config.graph_rank`."""
    if config.graph_rank is None or not batch.entries:
        return None
    if any(entry.num_new_tokens != 1 or not entry.is_last_chunk for entry in batch.entries):
        return None
    places = sorted(batch.places)
    rank = pool.max_rank(places)
    if rank > config.graph_rank or not all(pool.is_additive(place) for place in places):
        return None
    if pool.changes_head(places) or pool.changes_embedding(places):
        return None
    # a row of a composition is a row of as many segments
    needed = max(len(batch.entries), sum(len(entry.places) for entry in batch.entries))
    rows = next((size for size in row_sizes(config.max_num_seqs) if size >= needed), None)
    if rows is None:
        return None
    return Capacity(rows, next(size for size in rank_sizes(config.graph_rank) if size >= rank) if places else 0)


class StepGraphs:
    def __init__(self, forward: Callable[[ForwardBatch], Tensor], capture: Capture, max_num_seqs: int):
        """`forward`: the logits float32 [R, V] of a batch."""
        self._max_rows = row_sizes(max_num_seqs)[-1]
        self._forward = forward
        self._capture = capture
        self._replays: dict[Capacity, Callable[[], None]] = {}
        self._logits: Tensor | None = None  # of all graphs, as far as each needs

    @property
    def captured(self) -> tuple[Capacity, ...]:
        return tuple(self._replays)

    def run(self, capacity: Capacity, batch: ForwardBatch) -> Tensor:
        """Logits float32 [capacity.num_rows, V] of a batch built for `capacity`, valid until the next call."""
        replay = self._replays.get(capacity)
        if replay is None:
            replay = self._replays[capacity] = self._record(capacity, batch)
        replay()
        assert self._logits is not None
        return self._logits[: capacity.num_rows]

    def capture_all(self, buffers: BatchBuffers, pool: AdapterPool, config: EngineConfig) -> None:
        """So that no request waits for it. The largest first: what they leave in the memory pool the others use."""
        for capacity in _all_capacities(config):
            batch = buffers.build(ScheduledBatch(0, (), ()), pool, capacity)
            self._replays[capacity] = self._record(capacity, batch)

    def _record(self, capacity: Capacity, batch: ForwardBatch) -> Callable[[], None]:
        first = self._forward(_anew(batch))  # compiles kernels, and shows how wide the logits are
        if self._logits is None:
            self._logits = first.new_empty(self._max_rows, first.shape[1])
        logits = self._logits[: capacity.num_rows]

        def call() -> None:
            logits.copy_(self._forward(_anew(batch)))

        return self._capture(call)


def _all_capacities(config: EngineConfig) -> Iterator[Capacity]:
    if config.graph_rank is not None:
        for rows in reversed(row_sizes(config.max_num_seqs)):
            for rank in reversed(rank_sizes(config.graph_rank)):
                yield Capacity(rows, rank)


def _anew(batch: ForwardBatch) -> ForwardBatch:
    """The batch as its first reader finds it: kernels note their plan of the segments, and a graph has to make its
    own."""
    if batch.lora is None:
        return batch
    return replace(batch, lora=replace(batch.lora, segments=replace(batch.lora.segments)))
