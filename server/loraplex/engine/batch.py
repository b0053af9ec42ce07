"""ForwardBatch: a scheduled step as flat tensors, and the buffers it is written into.

T tokens of all sequences stand side by side in the order of the batch's entries, padded to a multiple of ROW_MULTIPLE
rows; R of them need logits (each sequence's last token, and prompt positions whose logprobs were asked for).
The buffers are allocated once; a batch is views into them, valid until the next one is built.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from loraplex.engine.adapter_pool import AdapterPool
from loraplex.engine.config import EngineConfig
from loraplex.engine.scheduled_batch import ScheduledBatch, ScheduledSequence
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
    def __init__(self, config: EngineConfig, device: torch.device):
        self._block_size = config.block_size
        self._device = device
        num_seqs = max(config.max_num_seqs, 2)  # the proof at load runs two side by side
        num_tokens = max(config.max_num_batched_tokens, num_seqs) + ROW_MULTIPLE
        num_segments = num_seqs * config.max_loras
        max_blocks = -(-config.max_model_len // config.block_size)
        self._input_ids = np.zeros(num_tokens, np.int64)
        self._positions = np.zeros(num_tokens, np.int64)
        self._slots = np.zeros(num_tokens, np.int64)
        self._logit_indices = np.zeros(num_tokens, np.int64)
        self._cu_seqlens = np.zeros(num_seqs + 1, np.int32)
        self._seq_lens = np.zeros(num_seqs, np.int32)
        self._block_tables = np.zeros((num_seqs, max_blocks), np.int32)
        self._body = SegmentBuffers(num_segments, device)
        self._head = SegmentBuffers(num_segments, device)

    def build(self, batch: ScheduledBatch, pool: AdapterPool) -> ForwardBatch:
        """`pool` tells the ranks of the adapters in their places, and which of them are more than deltas."""
        token = row = 0
        rows = []
        for index, entry in enumerate(batch.entries):
            self._write_tokens(index, entry, token)
            entry_rows = self._write_logit_rows(entry, token, row)
            rows.append(entry_rows)
            token += entry.num_new_tokens
            row = entry_rows.end
        padded = _padded(token)
        self._input_ids[token:padded] = 0
        self._positions[token:padded] = 0
        self._logit_indices[row : _padded(row)] = 0
        token_bounds = [0, *np.cumsum([entry.num_new_tokens for entry in batch.entries]).tolist()]
        row_bounds = [0, *(span.end for span in rows)]
        count = len(batch.entries)
        attn = AttentionMetadata(
            self._tensor(self._cu_seqlens[: count + 1]),
            self._tensor(self._seq_lens[:count]),
            self._tensor(self._block_tables[:count]),
            self._tensor(self._slots[:token]),
            self._block_size,
            max(entry.num_new_tokens for entry in batch.entries),
            min(entry.num_new_tokens for entry in batch.entries),
            int(self._seq_lens[:count].max()),
        )
        return ForwardBatch(
            self._tensor(self._input_ids[:padded]).unsqueeze(0),
            self._tensor(self._positions[:padded]).unsqueeze(0),
            attn,
            self._body.build(batch, token_bounds, pool),
            self._head.build(batch, row_bounds, pool) if pool.changes_head(batch.places) else None,
            self._tensor(self._logit_indices[: _padded(row)]),
            row,
            tuple(rows),
        )

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

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)


class SegmentBuffers:
    """The segments of one kind of rows (tokens, or rows of logits), written into arrays that are allocated once."""

    def __init__(self, num_segments: int, device: torch.device):
        self._device = device
        self._segments = np.zeros((4, num_segments), np.int32)  # start, end, place, offset
        self._scales = np.zeros(num_segments, np.float32)

    def build(self, batch: ScheduledBatch, bounds: Sequence[int], pool: AdapterPool) -> StepLoRA | None:
        """Rows bounds[i]:bounds[i + 1] are entry i's. None when no row is an adapter's."""
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
                self._segments[:, count] = (start, end, place, num_rows)
                self._scales[count] = use.scale
                spans.append(Span(start, end, place, num_rows, use.scale))
                num_rows += end - start
                if not pool.is_additive(place):
                    # A gain or a replaced parameter acts on the base's whole product: it has no meaning in a sum.
                    assert len(composition) == 1, "an adapter that is more than deltas runs alone"
                    assert use.scale == 1.0, "an adapter that is more than deltas runs at scale 1"
                    extras.append(spans[-1])
        if not spans:
            return None
        count = len(spans)
        starts, ends, placed, offsets = (self._tensor(self._segments[i, :count]) for i in range(4))
        max_rank = pool.max_rank([span.place for span in spans])
        scales = self._tensor(self._scales[:count])
        segments = LoRASegments(starts, ends, placed, scales, offsets, num_rows, max_rank)
        return StepLoRA(segments, tuple(spans), tuple(extras))

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)


def _padded(count: int) -> int:
    return -(-count // ROW_MULTIPLE) * ROW_MULTIPLE
