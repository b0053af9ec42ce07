"""ForwardBatch: a scheduled step as flat tensors, and the buffers it is written into.

T tokens of all sequences stand side by side in the order of the batch's entries, padded to a multiple of ROW_MULTIPLE
rows; R of them need logits (each sequence's last token, and prompt positions whose logprobs were asked for).
The buffers are allocated once; a batch is views into them, valid until the next one is built. One that is built for a
`Capacity` lies at the same addresses and in the same shapes each time, whatever it holds: a captured graph reads it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from loraplex.engine.adapter_pool import AdapterPool
from loraplex.engine.config import EngineConfig
from loraplex.engine.scheduled_batch import ScheduledBatch, ScheduledSequence
from loraplex.engine.step_buffer import Field, StepBuffer
from loraplex.model.linear import ROW_MULTIPLE
from loraplex.model.step_context import Span, StepLoRA
from loraplex.ops import AttentionMetadata, LoRASegments


@dataclass(frozen=True, slots=True)
class LogitRows:
    """Rows start:end of the logits belong to one entry. `first_position`: the sequence position of row `start`;
    the logits at position p are about token p + 1."""

    start: int
    end: int
    first_position: int


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a step that is captured has room for: `num_rows` sequences of one new token each, a multiple of
    ROW_MULTIPLE, as many segments and as many rows of segments; `max_rank` of any adapter, 0: rows of the base only."""

    num_rows: int
    max_rank: int


@dataclass(slots=True)
class ForwardBatch:
    """input_ids, positions int64 [1, T]; logit_indices int64 [R padded]; `rows[i]` of entry i."""

    input_ids: Tensor
    positions: Tensor
    attn: AttentionMetadata
    lora: StepLoRA | None
    head_lora: StepLoRA | None
    logit_indices: Tensor
    num_logit_rows: int
    rows: tuple[LogitRows, ...]


class BatchBuffers:
    def __init__(self, config: EngineConfig, device: torch.device, is_apart: bool | None = None):
        """`is_apart`: see `StepBuffer`."""
        self._block_size = config.block_size
        num_seqs = _padded(max(config.max_num_seqs, 2))  # the proof at load runs two side by side
        num_tokens = max(config.max_num_batched_tokens, num_seqs) + ROW_MULTIPLE
        num_segments = num_seqs * config.max_loras
        max_blocks = -(-config.max_model_len // config.block_size)
        fields: dict[str, Field] = {
            "input_ids": (torch.int64, (num_tokens,)),
            "positions": (torch.int64, (num_tokens,)),
            "slots": (torch.int64, (num_tokens,)),
            "logit_indices": (torch.int64, (num_tokens,)),
            "cu_seqlens": (torch.int32, (num_seqs + 1,)),
            "seq_lens": (torch.int32, (num_seqs,)),
            **SegmentBuffers.fields("body", num_segments),
            **SegmentBuffers.fields("head", num_segments),
            "block_tables": (torch.int32, (num_seqs, max_blocks)),  # last: the rows of no sequence are not sent
        }
        self._memory = StepBuffer(fields, device, is_apart)
        self._body = SegmentBuffers(self._memory, "body")
        self._head = SegmentBuffers(self._memory, "head")

    def build(self, batch: ScheduledBatch, pool: AdapterPool, capacity: Capacity | None = None) -> ForwardBatch:
        """`pool` tells the ranks of the adapters in their places, and which of them are more than deltas. With a
        `capacity` every entry has one new token and one row of logits, and the batch is filled up to it."""
        self._begin()
        token = row = 0
        rows = []
        for index, entry in enumerate(batch.entries):
            self._write_tokens(index, entry, token)
            entry_rows = self._write_logit_rows(entry, token, row)
            rows.append(entry_rows)
            token += entry.num_new_tokens
            row = entry_rows.end
        counts = [entry.num_new_tokens for entry in batch.entries]
        token_bounds = [0, *accumulate(counts)]
        row_bounds = [0, *(span.end for span in rows)]
        body = self._body.build(batch, token_bounds, pool)
        head = self._head.build(batch, row_bounds, pool) if pool.changes_head(batch.places) else None
        count = len(batch.entries)
        if capacity is None:
            longest, shortest = max(counts), min(counts)
            max_seq_len = int(self._seq_lens[:count].max())
        else:
            assert token == row == count <= capacity.num_rows
            assert head is None, "an adapter on the output head is not captured"
            longest = shortest = 1
            max_seq_len = None
            self._fill_sequences(count, capacity.num_rows)
            count = token = row = capacity.num_rows
            body = self._body.at_capacity(capacity) if capacity.max_rank else None
        padded = _padded(token)
        self._input_ids[token:padded] = 0
        self._positions[token:padded] = 0
        self._logit_indices[row : _padded(row)] = 0
        self._memory.send(count)
        tensors = self._memory.tensors
        attn = AttentionMetadata(
            tensors["cu_seqlens"][: count + 1],
            tensors["seq_lens"][:count],
            tensors["block_tables"][:count],
            tensors["slots"][:token],
            self._block_size,
            longest,
            shortest,
            max_seq_len,
        )
        return ForwardBatch(
            tensors["input_ids"][:padded].unsqueeze(0),
            tensors["positions"][:padded].unsqueeze(0),
            attn,
            body,
            head,
            tensors["logit_indices"][: _padded(row)],
            row,
            tuple(rows),
        )

    def _begin(self) -> None:
        self._memory.begin()
        arrays = self._memory.arrays
        self._input_ids, self._positions, self._slots = arrays["input_ids"], arrays["positions"], arrays["slots"]
        self._cu_seqlens, self._seq_lens = arrays["cu_seqlens"], arrays["seq_lens"]
        self._logit_indices, self._block_tables = arrays["logit_indices"], arrays["block_tables"]

    def _fill_sequences(self, count: int, end: int) -> None:
        """Make sequences count:end ones of a token that is stored nowhere and sees nothing."""
        self._input_ids[count:end] = self._positions[count:end] = self._logit_indices[count:end] = 0
        self._slots[count:end] = -1
        self._cu_seqlens[count + 1 : end + 1] = np.arange(count + 1, end + 1)
        self._seq_lens[count:end] = 0

    def _write_tokens(self, index: int, entry: ScheduledSequence, token: int) -> None:
        seq, size = entry.seq, self._block_size
        start, end = seq.num_computed_tokens, seq.num_computed_tokens + entry.num_new_tokens
        stop = token + entry.num_new_tokens
        blocks = self._block_tables[index]
        blocks[: len(seq.block_table)] = seq.block_table
        positions = np.arange(start, end)
        self._input_ids[token:stop] = seq.token_ids[start:end]
        self._positions[token:stop] = positions
        self._slots[token:stop] = blocks[positions // size].astype(np.int64) * size + positions % size
        self._cu_seqlens[index + 1] = stop
        self._seq_lens[index] = end

    def _write_logit_rows(self, entry: ScheduledSequence, token: int, row: int) -> LogitRows:
        """Every position whose next token is an unreported prompt token, and the last one if a token is due."""
        seq = entry.seq
        start, end = seq.num_computed_tokens, seq.num_computed_tokens + entry.num_new_tokens
        first = end - 1 if entry.is_last_chunk else end
        if seq.wants_prompt_logprobs and seq.num_prompt_logprobs < seq.num_prompt_tokens - 1:
            first = min(first, max(start, seq.num_prompt_logprobs))
        count = end - first
        self._logit_indices[row : row + count] = np.arange(token + first - start, token + end - start)
        return LogitRows(row, row + count, first)


class SegmentBuffers:
    """The segments of one kind of rows (tokens, or rows of logits), written into arrays that are allocated once."""

    def __init__(self, memory: StepBuffer, kind: str):
        self._memory = memory
        self._kind = kind
        tensors = memory.tensors
        self._columns = (*tensors[f"{kind}_segments"].unbind(), tensors[f"{kind}_scales"])
        self._count = tensors[f"{kind}_count"]

    @staticmethod
    def fields(kind: str, num_segments: int) -> dict[str, Field]:
        return {
            f"{kind}_segments": (torch.int32, (4, num_segments)),  # start, end, place, offset
            f"{kind}_scales": (torch.float32, (num_segments,)),
            f"{kind}_count": (torch.int32, (1,)),
        }

    def build(self, batch: ScheduledBatch, bounds: Sequence[int], pool: AdapterPool) -> StepLoRA | None:
        """Rows bounds[i]:bounds[i + 1] are entry i's. None when no row is an adapter's."""
        arrays, kind = self._memory.arrays, self._kind
        segments, scales = arrays[f"{kind}_segments"], arrays[f"{kind}_scales"]
        spans: list[Span] = []
        extras: list[Span] = []
        num_rows = index = 0
        entries = batch.entries
        while index < len(entries):
            composition, places = entries[index].seq.request.composition, entries[index].places
            start = bounds[index]
            while index < len(entries) and entries[index].seq.request.composition == composition:
                index += 1
            end = bounds[index]
            if start == end:
                continue
            for use, place in zip(composition, places, strict=True):
                count = len(spans)
                segments[:, count] = (start, end, place, num_rows)
                scales[count] = use.scale
                spans.append(Span(start, end, place, num_rows, use.scale))
                num_rows += end - start
                if not pool.is_additive(place):
                    # A gain or a replaced parameter acts on the base's whole product: it has no meaning in a sum.
                    assert len(composition) == 1, "an adapter that is more than deltas runs alone"
                    assert use.scale == 1.0, "an adapter that is more than deltas runs at scale 1"
                    extras.append(spans[-1])
        arrays[f"{kind}_count"][0] = len(spans)
        if not spans:
            return None
        max_rank = pool.max_rank([span.place for span in spans])
        return StepLoRA(self._tensors(len(spans), num_rows, max_rank), tuple(spans), tuple(extras))

    def at_capacity(self, capacity: Capacity) -> StepLoRA:
        """The segments that were built last, in a launch of that size: how many live ones there are is read on the
        device."""
        lora = self._tensors(capacity.num_rows, capacity.num_rows, capacity.max_rank)
        lora.count = self._count
        return StepLoRA(lora, ())

    def _tensors(self, count: int, num_rows: int, max_rank: int) -> LoRASegments:
        start, end, place, offset, scale = (column[:count] for column in self._columns)
        return LoRASegments(start, end, place, scale, offset, num_rows, max_rank)


def _padded(count: int) -> int:
    return -(-count // ROW_MULTIPLE) * ROW_MULTIPLE
