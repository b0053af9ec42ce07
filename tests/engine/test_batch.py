"""ForwardBatch against a builder that is slow and plain, for every batch of random schedules."""

import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scheduler_rig import Rig, make_sequence, uses

from loraplex.engine.batch import BatchBuffers, Capacity, ForwardBatch, LogitRows
from loraplex.engine.messages import TokenLogprobs
from loraplex.engine.scheduled_batch import RowResult, ScheduledBatch, ScheduledSequence
from loraplex.model.linear import ROW_MULTIPLE


class FakePool:
    """The adapter in place p has rank p + 1; the last one changes the output head."""

    def __init__(self, head_place: int):
        self.head_place = head_place

    def max_rank(self, places: list[int]) -> int:
        return max(places) + 1

    def is_additive(self, place: int) -> bool:
        return True

    def changes_head(self, places) -> bool:
        return self.head_place in set(places)


class BatchRig(Rig):
    """Builds every scheduled batch and compares it; answers with the prompt logprobs that its rows stand for."""

    def __init__(self, is_apart: bool | None = None, **sizes):
        super().__init__(**sizes)
        self.buffers = BatchBuffers(self.config, torch.device("cpu"), is_apart)
        self.pool = FakePool(self.config.max_loras - 1)
        self.reported: dict[str, list[int]] = {}
        self.num_heads = self.num_batches = 0
        self._rows: dict[str, list[int]] = {}

    def _check_batch(self, batch: ScheduledBatch) -> None:
        super()._check_batch(batch)
        if batch.entries:
            built = self.buffers.build(batch, self.pool)  # type: ignore[arg-type]
            self.compare(batch, built)
            self.num_batches += 1

    def compare(self, batch: ScheduledBatch, built: ForwardBatch) -> None:
        size = self.config.block_size
        ids, positions, slots, rows, users, row_users = [], [], [], [], [], []
        cu_seqlens, seq_lens = [0], []
        self._rows = {}
        for entry, span in zip(batch.entries, built.rows, strict=True):
            seq = entry.seq
            start, end = seq.num_computed_tokens, seq.num_computed_tokens + entry.num_new_tokens
            wanted = self._rows[seq.seq_id] = []
            adapters = [(place, use.scale) for place, use in zip(entry.places, seq.request.composition, strict=True)]
            for position in range(start, end):
                if self.is_wanted(seq, position, end):
                    wanted.append(position)
                    rows.append(len(ids))
                    row_users.append(adapters)
                ids.append(seq.token_ids[position])
                positions.append(position)
                slots.append(seq.block_table[position // size] * size + position % size)
                users.append(adapters)
            cu_seqlens.append(len(ids))
            seq_lens.append(end)
            assert span.end - span.start == len(wanted)
            assert not wanted or list(range(span.first_position, span.first_position + len(wanted))) == wanted
        padding = -len(ids) % ROW_MULTIPLE
        assert built.input_ids.tolist() == [ids + [0] * padding]
        assert built.positions.tolist() == [positions + [0] * padding]
        assert built.attn.slot_mapping.tolist() == slots
        assert built.attn.cu_seqlens_q.tolist() == cu_seqlens
        assert built.attn.seq_lens.tolist() == seq_lens
        assert built.attn.block_size == size
        for entry, table in zip(batch.entries, built.attn.block_tables.tolist(), strict=True):
            assert table[: len(entry.seq.block_table)] == entry.seq.block_table
        assert built.num_logit_rows == len(rows)
        assert built.logit_indices.tolist() == rows + [0] * (-len(rows) % ROW_MULTIPLE)
        self.compare_segments(built.lora, users)
        has_head = any(place == self.pool.head_place for adapters in users for place, _ in adapters)
        if has_head:
            self.compare_segments(built.head_lora, row_users)
            self.num_heads += 1
        else:
            assert built.head_lora is None

    def is_wanted(self, seq, position: int, end: int) -> bool:
        is_due = position == end - 1 and end == seq.num_tokens
        is_prompt = seq.wants_prompt_logprobs and position + 1 < seq.num_prompt_tokens
        return is_due or (is_prompt and position not in self.reported.get(seq.seq_id, []))

    def compare_segments(self, step, users: list[list[tuple[int, float]]]) -> None:
        if not any(users):
            assert step is None
            return
        segments = step.segments
        columns = (segments.start, segments.end, segments.place, segments.scale, segments.offset)
        found: list[list[tuple[int, float]]] = [[] for _ in users]
        num_rows, rank = 0, 0
        for start, end, place, scale, offset in zip(*(column.tolist() for column in columns), strict=True):
            assert start < end
            assert offset == num_rows
            for row in range(start, end):
                found[row].append((place, scale))
            num_rows += end - start
            rank = max(rank, place + 1)
        assert found == users
        assert (segments.num_rows, segments.max_rank) == (num_rows, rank)
        assert [(s.start, s.end, s.place, s.offset) for s in step.spans] == list(
            zip(*(c.tolist() for c in (segments.start, segments.end, segments.place, segments.offset)), strict=True)
        )
        blocks = 1 + sum(a != b for a, b in zip(users, users[1:], strict=False))
        assert len(step.spans) <= blocks * self.config.max_loras
        assert len({tuple(u) for u in users}) == blocks, "one composition's rows are not neighbours"

    def _result(self, entry) -> RowResult:
        seq = entry.seq
        result = super()._result(entry)
        reported = [p for p in self._rows[seq.seq_id] if p + 1 < seq.num_prompt_tokens and seq.wants_prompt_logprobs]
        self.reported.setdefault(seq.seq_id, []).extend(reported)
        return RowResult(result.token_id, prompt_logprobs=tuple(TokenLogprobs(0, 0.0) for _ in reported))


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 10**6),
    num_blocks=st.sampled_from([16, 24, 64]),
    budget=st.sampled_from([5, 9, 32]),
    quantum=st.sampled_from([1, 4, 20]),
)
def test_random_schedules(seed: int, num_blocks: int, budget: int, quantum: int):
    rng = random.Random(seed)
    rig = BatchRig(
        max_num_seqs=5, max_num_batched_tokens=budget, max_model_len=64, num_blocks=num_blocks, max_loras=3,
        fairness_quantum=quantum, adapter_cache_bytes=4,
    )  # fmt: skip
    for i in range(rng.randrange(2, 14)):
        names = rng.sample("abcde", rng.choice((0, 1, 1, 2, 3)))
        composition = tuple(use for name in names for use in uses(name, scale=rng.choice((1.0, 0.5))))
        prompt = [rng.randrange(3) for _ in range(rng.randrange(1, 40))]
        params = {"prompt_logprobs": 0} if rng.random() < 0.5 else {}
        rig.add(str(i), composition, prompt=prompt, max_tokens=rng.randrange(0, 24), **params)
        for _ in range(rng.choice((0, 1, 3))):
            rig.step()
    rig.run()
    for name, seq in rig.seqs.items():
        expected = list(range(seq.num_prompt_tokens - 1)) if seq.wants_prompt_logprobs else []
        assert rig.reported.get(name, []) == expected, "every prompt position is reported once and in order"


def test_prompt_logprobs_over_chunks_and_a_preemption():
    rig = BatchRig(
        max_num_seqs=2, max_num_batched_tokens=6, max_model_len=64, num_blocks=16, fairness_quantum=2, max_loras=1
    )
    rig.add("echo", uses("a"), prompt=40, max_tokens=10, prompt_logprobs=0)
    rig.steps(4)
    rig.add("other", uses("b"), prompt=20, max_tokens=10)
    rig.run()
    assert rig.scheduler.num_preemptions > 0
    assert rig.reported["echo"] == list(range(39))
    assert rig.num_heads == rig.num_batches - 1 or rig.num_heads > 0


def test_the_largest_batch_fits_the_buffers():
    """Every slot a composition of as many adapters as places, every token used, every position wanted."""
    rig = BatchRig(
        max_num_seqs=4, max_num_batched_tokens=16, max_model_len=64, block_size=4, num_blocks=64, max_loras=3
    )
    for i in range(4):
        names = [("a", "b", "c"), ("c", "b", "a"), ("b", "a", "c"), ("b", "c", "a")][i]
        rig.add(str(i), uses(*names), prompt=64, max_tokens=0, prompt_logprobs=0)
    for i in range(4, 8):
        rig.add(str(i), uses("a", "b", "c", scale=float(i)), prompt=60, max_tokens=4)
    rig.run()
    assert [rig.reported[str(i)] for i in range(4)] == [list(range(63))] * 4


@pytest.mark.parametrize("count", range(1, 10))
def test_padding(count: int):
    """Rows past the tokens are zero, whatever an earlier batch left in the buffers."""
    rig = BatchRig(max_num_seqs=2, max_num_batched_tokens=16)
    rig.add("first", prompt=[7] * 16, max_tokens=1)
    rig.step()
    rig.add("second", prompt=[5] * count, max_tokens=1)
    rig.run()


def test_a_device_with_its_own_memory_reads_the_same():
    rig = BatchRig(is_apart=True, max_num_seqs=3, max_num_batched_tokens=16, max_loras=3)
    for i, names in enumerate([("a",), (), ("a", "b"), ("c",), ("b",)]):
        rig.add(str(i), uses(*names), prompt=5 + 7 * i, max_tokens=6, **({"prompt_logprobs": 0} if i == 3 else {}))
    rig.run()
    assert rig.num_heads > 0


@pytest.mark.parametrize("is_apart", [False, True])
def test_at_capacity_the_tensors_stay_where_they_are(is_apart: bool):
    """Decodes of other lengths, adapters and numbers: in the live part what an ordinary build gives, past it nothing
    that is stored, seen or added to."""
    rig = Rig(max_num_seqs=8, max_loras=4)
    buffers, ordinary = (BatchBuffers(rig.config, torch.device("cpu"), apart) for apart in (is_apart, False))
    pool, capacity = FakePool(9), Capacity(8, 16)
    addresses = set()
    for names in ([], ["a"], ["b", "b", "c", "", "a"], ["d"] * 8, ["", "a+b", "c", "c"]):
        entries = []
        for i, name in enumerate(names):
            seq = make_sequence(f"s{i}", range(3, 3 + 9 * (i + 1)), uses(*filter(None, name.split("+"))))
            seq.block_table, seq.num_computed_tokens = list(range(i, 12 + i)), seq.num_tokens - 1
            entries.append(ScheduledSequence(seq, 1, tuple(map(ord, filter(str.isalpha, name)))))
        batch = ScheduledBatch(0, tuple(entries), ())
        built = buffers.build(batch, pool, capacity)  # type: ignore[arg-type]
        attn, lora, n = built.attn, built.lora, len(names)
        assert lora is not None
        assert lora.segments.count is not None
        live = int(lora.segments.count)
        tensors = [built.input_ids, built.positions, built.logit_indices, attn.cu_seqlens_q, attn.seq_lens]
        tensors += [attn.block_tables, attn.slot_mapping, lora.segments.start, lora.segments.scale, lora.segments.count]
        addresses.add(tuple((tensor.data_ptr(), tensor.shape) for tensor in tensors))
        assert attn.cu_seqlens_q.tolist() == list(range(9))
        assert attn.seq_lens[n:].tolist() == [0] * (8 - n)
        assert attn.slot_mapping[n:].tolist() == [-1] * (8 - n)
        assert (attn.min_query_len, attn.max_query_len, attn.max_seq_len) == (1, 1, None)
        assert (lora.spans, lora.segments.num_rows, lora.segments.max_rank, built.num_logit_rows) == ((), 8, 16, 8)
        assert built.rows == tuple(
            LogitRows(i, i + 1, seq.num_tokens - 1) for i, seq in enumerate(entry.seq for entry in entries)
        )
        if not names:
            assert live == 0
            continue
        wanted = ordinary.build(batch, pool)  # type: ignore[arg-type]
        for found, plain in (
            (built.input_ids, wanted.input_ids), (built.positions, wanted.positions),
            (attn.slot_mapping.unsqueeze(0), wanted.attn.slot_mapping.unsqueeze(0)),
            (attn.seq_lens.unsqueeze(0), wanted.attn.seq_lens.unsqueeze(0)),
            (built.logit_indices.unsqueeze(0), wanted.logit_indices.unsqueeze(0)),
        ):  # fmt: skip
            assert torch.equal(found[:, :n], plain[:, :n])
        for i, entry in enumerate(entries):
            assert attn.block_tables[i, : len(entry.seq.block_table)].tolist() == entry.seq.block_table
        if wanted.lora is None:
            assert live == 0
            continue
        assert live == len(wanted.lora.spans)
        for name in ("start", "end", "place", "scale", "offset"):
            column = getattr(lora.segments, name)[:live]
            assert torch.equal(column, getattr(wanted.lora.segments, name)), name
    assert len(addresses) == 1
