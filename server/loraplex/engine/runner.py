"""ModelRunner: owns the wrapped model, the paged cache and the adapter pool; turns a scheduled step into results."""

from collections.abc import Mapping

import torch
from torch import Tensor

from loraplex.engine.adapter_pool import AdapterPool
from loraplex.engine.batch import BatchBuffers, ForwardBatch, LogitRows
from loraplex.engine.config import EngineConfig
from loraplex.engine.kept_logits import KeptLogits
from loraplex.engine.messages import Failure, TokenLogprobs
from loraplex.engine.sampler import Sampler, rate, read_logprobs
from loraplex.engine.scheduled_batch import RowResult, ScheduledBatch, ScheduledSequence
from loraplex.engine.step_graphs import Capture, CudaCapture, StepGraphs, capacity_for
from loraplex.lora.weights import ModuleShape
from loraplex.model.attention import KVCache, LayerGeometry, PagedStep
from loraplex.model.devices import fetch, send
from loraplex.model.loader import BaseModel
from loraplex.model.merged import MergedWeights
from loraplex.model.step_context import StepContext
from loraplex.model.targets import wrap_modules
from loraplex.ops import Ops, select_ops

NUM_PROBE_TOKENS = 8
"""Tokens of each of the three sequences of an adapter's proof (`probe`)."""

_NOT_FINITE = Failure(
    "non_finite_logits",
    "The model's output for this request is not a number (NaN or infinite). Its adapter or its base produces values "
    "outside the number format; other requests are not affected.",
)


class ModelRunner:
    def __init__(
        self,
        base: BaseModel,
        geometry: Mapping[int, LayerGeometry],
        config: EngineConfig,
        ops: Ops | None = None,
        capture: Capture | None = None,
    ):
        """`capture`: how a step is captured, where `config.graph_rank` asks for it; None: as a CUDA graph."""
        self.base = base
        self.config = config
        self.ops = ops if ops is not None else select_ops(base.device)
        # Blocks and a place more than requests can use: an adapter's proof stands in nobody's way, nor they in its.
        each = -(-NUM_PROBE_TOKENS // config.block_size)
        num_blocks = config.num_blocks + 3 * each
        self.probe_blocks = [range(start, start + each) for start in range(config.num_blocks, num_blocks, each)]
        self.probe_place = config.max_loras
        self.cache = KVCache(dict(geometry), num_blocks, config.block_size, base.dtype, base.device)
        with_tables = getattr(self.ops, "READS_TABLES", False)
        self.pool = AdapterPool(base.targets, config.max_loras + 1, base.device, with_tables, config.place_bytes)
        self.merged: dict[str, MergedWeights] = {}  # written by `install` and `remove`
        self._context = StepContext()
        wrap_modules(base.model, base.targets, self.pool.modules, self.pool.extras, self._context, self.ops)
        self._buffers = BatchBuffers(config, base.device)
        self._graphs: StepGraphs | None = None
        if config.graph_rank is not None:
            self._graphs = StepGraphs(self._whole_logits, capture or CudaCapture(), config.max_num_seqs)
        self._sampler = Sampler(config.eos_token_ids, self.ops)
        self.kept_logits = KeptLogits()

    def install(self, merged: MergedWeights) -> None:
        """Let steps that are wholly one adapter's run on its merged weights, from the next one on."""
        merged.install(self.base.model)
        self.merged[merged.digest] = merged

    def remove(self, digest: str) -> None:
        """The counterpart of `install`."""
        self.merged.pop(digest).remove(self.base.model)

    @property
    def targets(self) -> Mapping[str, ModuleShape]:
        return self.base.targets

    @torch.inference_mode()
    def execute(self, batch: ScheduledBatch) -> list[RowResult]:
        """One step: adapters into their places, one forward pass for all rows, sampling. One result per entry."""
        self._load(batch)
        logits, _, rows = self._compute(batch, self.merged_for(batch))
        return self._results(batch, rows, logits)

    def _load(self, batch: ScheduledBatch) -> None:
        for place, weights in batch.adapter_loads:
            # kernels see addresses only
            assert weights.slab.dtype == self.base.dtype, f"{weights.digest} is {weights.slab.dtype}"
            self.pool.load(place, weights)

    def _compute(
        self, batch: ScheduledBatch, merged: str | None
    ) -> tuple[Tensor, PagedStep | None, tuple[LogitRows, ...]]:
        """The forward pass: as a graph where one takes the step (there is no step to look at then), else in eager
        mode."""
        capacity = None
        if self._graphs is not None and merged is None:
            capacity = capacity_for(batch, self.pool, self.config)
        forward = self._buffers.build(batch, self.pool, capacity)
        if self._graphs is None or capacity is None:
            return *self.forward(forward, merged), forward.rows
        return self._graphs.run(capacity, forward)[: len(batch.entries)], None, forward.rows

    @torch.inference_mode()
    def capture_graphs(self) -> None:
        """Every graph that `config.graph_rank` asks for, before the first request."""
        if self._graphs is not None:
            self._graphs.capture_all(self._buffers, self.pool, self.config)

    def _whole_logits(self, batch: ForwardBatch) -> Tensor:
        return self.forward(batch)[0]

    def merged_for(self, batch: ScheduledBatch) -> str | None:
        """The adapter whose merged weights `execute` runs the step on; None: on the base's."""
        digest = batch.sole_adapter
        return digest if digest in self.merged else None

    def forward(self, batch: ForwardBatch, merged: str | None = None) -> tuple[Tensor, PagedStep]:
        """Logits float32 [R, V] of the rows that need them, and the step as the attention layers saw it."""
        step = PagedStep(self.ops, self.cache, batch.attn)
        loras = (batch.lora, batch.head_lora) if merged is None else (None, None)
        with self._context.running(*loras, merged):
            output = self.base.model(
                input_ids=batch.input_ids,
                position_ids=batch.positions,
                use_cache=False,
                logits_to_keep=batch.logit_indices,
                paged=step,
            )
        return output.logits[0, : batch.num_logit_rows].float(), step

    @torch.inference_mode()
    def logits(self, batch: ScheduledBatch) -> tuple[Tensor, PagedStep | None, tuple[LogitRows, ...]]:
        """The forward pass of a step without sampling, for proofs and tests; never on merged weights. No PagedStep of
        one that ran as a graph."""
        self._load(batch)
        return self._compute(batch, None)

    def _results(self, batch: ScheduledBatch, rows: tuple[LogitRows, ...], logits: Tensor) -> list[RowResult]:
        sampled = [
            (index, rows[index].end - 1, entry.seq)
            for index, entry in enumerate(batch.entries)
            if entry.is_last_chunk and entry.seq.request.params.max_tokens > 0
        ]
        chosen_logits = logits
        if len(sampled) != len(logits):
            chosen_logits = logits[send([row for _, row, _ in sampled], torch.int64, logits.device)]
        chosen = self._sampler.choose(chosen_logits, [seq for _, _, seq in sampled])
        counts = {i: n for i, (_, _, seq) in enumerate(sampled) if (n := seq.request.params.logprobs) is not None}
        rated = self._rate(chosen_logits, chosen, counts)
        # the one wait of a step, unless prompts' logprobs are asked for
        finite, chosen, *rated = fetch(_are_finite(logits), chosen, *rated)
        is_finite, tokens = finite.tolist(), chosen.tolist()
        token_of = {index: token for (index, _, _), token in zip(sampled, tokens, strict=True)}
        logprobs: dict[int, TokenLogprobs] = {}
        if counts:
            found = read_logprobs([tokens[i] for i in counts], list(counts.values()), rated)
            logprobs = {sampled[i][0]: one for i, one in zip(counts, found, strict=True)}
        results = []
        for index, entry in enumerate(batch.entries):
            entry_rows = rows[index]
            if not all(is_finite[entry_rows.start : entry_rows.end]):
                results.append(RowResult(failure=_NOT_FINITE))
                continue
            prompt = self._prompt_logprobs(entry, entry_rows, logits)
            results.append(RowResult(token_of.get(index), logprobs.get(index), prompt))
        return results

    def _rate(self, logits: Tensor, tokens: Tensor, counts: Mapping[int, int]) -> tuple[Tensor, ...]:
        """`rate` of the rows that have a count of alternatives."""
        if not counts:
            return ()
        index = send(list(counts), torch.int64, logits.device)
        return rate(logits[index], tokens[index], max(counts.values()))

    def _prompt_logprobs(self, entry: ScheduledSequence, rows: LogitRows, logits: Tensor) -> tuple[TokenLogprobs, ...]:
        """Of the prompt tokens that this chunk's logits are about, in order, none twice."""
        seq = entry.seq
        if not seq.wants_prompt_logprobs:
            return ()
        first = rows.first_position
        last = min(first + rows.end - rows.start, seq.num_prompt_tokens - 1)
        if first >= last:
            return ()
        count = seq.request.params.prompt_logprobs or 0
        tokens = seq.token_ids[first + 1 : last + 1]
        own = logits[rows.start : rows.start + len(tokens)]
        found = tuple(self._sampler.logprobs(own, tokens, [count] * len(tokens)))
        return self.kept_logits.see(seq, first - seq.request.params.prompt_logprobs_from, own, found)


def _are_finite(logits: Tensor) -> Tensor:
    """bool [R]: whether a row is all numbers, by its largest."""
    return logits.amax(-1).isfinite() if len(logits) else torch.empty(0, dtype=torch.bool, device=logits.device)
