"""Scheduler: which tokens run in the next step, with which adapters in which places. Pure Python, no torch.

One `schedule()` decides everything a step needs: loads from disk ahead of need, leases, places, blocks, tokens. Places
are assigned in the same call that lists the sequences that use them, so a map from tokens to places is never stale.

A sequence that runs holds leases on its adapters and blocks for its tokens; one that waits or was preempted holds
neither. Everything is taken at once on admission, so nothing is held while waiting for something else.

Fairness: compositions are served in the order of `WaitingQueue`. One that nothing runs of and that has been blocked for
`fairness_quantum` steps turns out the most served composition whose tenure is over. So with P places and W blocked
adapters ahead of it an adapter that is in RAM waits at most (W // P + 1) turns of at most 2 quanta each.
"""

import heapq
from enum import Enum, auto
from typing import TYPE_CHECKING, Protocol

from loraplex.engine.adapter_cache import AdapterCache
from loraplex.engine.adapter_places import AdapterPlaces
from loraplex.engine.block_manager import BlockManager
from loraplex.engine.config import EngineConfig
from loraplex.engine.messages import Composition, Failure, FinishReason, SequenceOutput
from loraplex.engine.scheduled_batch import RowResult, ScheduledBatch, ScheduledSequence
from loraplex.engine.sequence import Sequence, SequenceStatus
from loraplex.engine.waiting_queue import WaitingQueue

if TYPE_CHECKING:
    from loraplex.engine.adapter_loads import FinishedLoad
    from loraplex.lora.weights import LoRAWeights


class StartsLoads(Protocol):
    def start(self, digest: str) -> None: ...


class Blocked(Enum):
    """Why a waiting composition cannot run."""

    ADAPTER = auto()  # RAM or place: adapters in use are in the way
    SEQUENCES = auto()  # max_num_seqs or KV blocks: sequences are in the way
    NOT_NOW = auto()  # its load is under way, or the step's token budget is spent


class Scheduler:
    def __init__(
        self,
        config: EngineConfig,
        cache: AdapterCache,
        places: AdapterPlaces,
        blocks: BlockManager,
        loads: StartsLoads,
    ):
        self.config = config
        self.cache = cache
        self.places = places
        self.blocks = blocks
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []
        self.step = 0
        self.num_preemptions = 0
        self.num_prefix_queries = 0  # prompt tokens looked up in the prefix cache, and found there
        self.num_prefix_hits = 0
        self._loads = loads
        self._loading: set[str] = set()
        self._blocked: dict[Composition, tuple[int, Blocked]] = {}
        self._num_arrivals = 0

    # -- coming and going -------------------------------------------------------------------------------------

    def add(self, seq: Sequence) -> None:
        seq.arrival = self._num_arrivals
        self._num_arrivals += 1
        self.waiting.push(seq)

    def abort(self, seq: Sequence) -> None:
        self._finish(seq, FinishReason.ABORT)

    @property
    def sequences(self) -> list[Sequence]:
        return [*self.running, *self.waiting]

    @property
    def is_loading(self) -> bool:
        return bool(self._loading)

    # -- the step ---------------------------------------------------------------------------------------------

    def schedule(self) -> ScheduledBatch:
        self.step += 1
        self._turn_out()
        self._start_loads()
        draft = _Draft(self.config.max_num_batched_tokens)
        self._schedule_running(draft)
        self._admit(draft)
        for seq, num_tokens in draft.tokens.items():
            self.waiting.serve(seq.request.composition, num_tokens)
        entries = [
            ScheduledSequence(seq, n, tuple(self.places.place_of(digest) for digest in seq.digests))
            for seq, n in draft.tokens.items()
        ]
        entries.sort(key=lambda entry: (entry.places, entry.seq.arrival))
        return ScheduledBatch(self.step, tuple(entries), tuple(draft.adapter_loads.items()))

    def update(self, batch: ScheduledBatch, results: list[RowResult]) -> list[SequenceOutput]:
        """Take in what the step computed; returns one output for every sequence that has something to say."""
        outputs = []
        for entry, result in zip(batch.entries, results, strict=True):
            seq = entry.seq
            is_last_chunk = entry.is_last_chunk
            seq.num_computed_tokens += entry.num_new_tokens
            if result.failure is not None:
                outputs.append(self._fail(seq, result.failure))
                continue
            self.blocks.commit(seq)
            seq.num_prompt_logprobs += len(result.prompt_logprobs)
            reason, stop_reason = None, None
            if is_last_chunk:
                if result.token_id is not None:
                    seq.token_ids.append(result.token_id)
                reason, stop_reason = self._finish_reason(seq)
                if reason is not None:
                    self._finish(seq, reason)
            if is_last_chunk or result.prompt_logprobs:
                outputs.append(
                    SequenceOutput(
                        seq.seq_id,
                        result.token_id,
                        result.logprobs,
                        result.prompt_logprobs,
                        reason,
                        stop_reason,
                        num_cached_tokens=seq.num_cached_tokens,
                    )
                )
        return outputs

    def fail(self, batch: ScheduledBatch, failure: Failure) -> list[SequenceOutput]:
        """End every sequence of a step that went wrong. What it computed is not offered to others."""
        return [self._fail(e.seq, failure) for e in batch.entries if e.seq.status is SequenceStatus.RUNNING]

    def finish_load(self, load: "FinishedLoad") -> list[SequenceOutput]:
        """Make a loaded adapter resident, or end the sequences that waited for one that cannot be had."""
        self._loading.discard(load.digest)
        message = load.error.message if load.error is not None else ""
        if load.weights is not None:
            try:
                self.cache.insert(load.weights)
                return []
            except ValueError as error:
                message = str(error)
        self.cache.cancel_reservation(load.digest)
        failure = Failure("adapter_load_failed", message)
        return [self._fail(seq, failure) for seq in list(self.waiting) if load.digest in seq.digests]

    # -- parts of schedule() ----------------------------------------------------------------------------------

    def _turn_out(self) -> None:
        quantum = self.config.fairness_quantum
        for composition in self.waiting.compositions():
            since, why = self._blocked.get(composition, (self.step, Blocked.NOT_NOW))
            if self.step - since < quantum:
                continue
            for seq in self._victims(composition, why):
                self._preempt(seq)

    def _victims(self, composition: Composition, why: Blocked) -> list[Sequence]:
        """Running sequences whose turn is over, to make way for `composition`; [] when there are none."""
        floor = self.waiting.served(composition)
        over = [
            seq
            for seq in self.running
            if self.step - seq.admitted_step >= self.config.fairness_quantum
            and self.waiting.served(seq.request.composition) >= floor
        ]
        if why is Blocked.ADAPTER:
            over = [
                seq
                for seq in self.running
                if seq.digests
                and self.waiting.served(seq.request.composition) >= floor
                and all(self.step - self.places.since(d) >= self.config.fairness_quantum for d in seq.digests)
            ]
        if not over:
            return []
        chosen = max(over, key=lambda seq: (self.waiting.served(seq.request.composition), seq.arrival))
        if why is Blocked.SEQUENCES:
            return [chosen]
        digests = set(chosen.digests)
        return [seq for seq in self.running if digests & set(seq.digests)]

    def _start_loads(self) -> None:
        """Look ahead over the queue in the order of service and bring adapters into RAM. What comes earlier keeps its
        room: nothing it needs is evicted for something later."""
        protected: set[str] = set()
        for composition in self.waiting.compositions():
            for use in composition:
                protected.add(use.digest)
                if use.digest in self.cache or use.digest in self._loading:
                    continue
                if len(self._loading) >= self.config.max_concurrent_loads:
                    return
                if not self.cache.reserve(use.digest, use.nbytes, protected):
                    self._note_blocked(composition, Blocked.ADAPTER)
                    return
                self._loading.add(use.digest)
                self._loads.start(use.digest)

    def _schedule_running(self, draft: "_Draft") -> None:
        # Decodes first: a long prompt's chunk takes what is left of the budget, never another stream's next token.
        for seq in sorted(self.running, key=lambda seq: seq.num_new_tokens > 1):
            if seq.status is not SequenceStatus.RUNNING:  # preempted for another one a moment ago
                continue
            num_new_tokens = min(seq.num_new_tokens, draft.budget)
            if num_new_tokens == 0:
                continue
            if self._make_room(seq, seq.num_computed_tokens + num_new_tokens, draft):
                draft.take(seq, num_new_tokens)

    def _make_room(self, seq: Sequence, num_tokens: int, draft: "_Draft") -> bool:
        """Grow the blocks of a running sequence, preempting the youngest until they suffice. False: it was `seq`."""
        while not self.blocks.grow(seq, num_tokens):
            victim = max(self.running, key=lambda other: (other.admitted_step, other.arrival))
            draft.give_back(victim)
            self._preempt(victim)
            if victim is seq:
                return False
        return True

    def _admit(self, draft: "_Draft") -> None:
        heap = [(self.waiting.served(c), i, c) for i, c in enumerate(self.waiting.compositions())]
        heapq.heapify(heap)
        while heap:
            _, order, composition = heapq.heappop(heap)
            seq = self.waiting.head(composition)
            assert seq is not None
            why = self._try_admit(seq, draft)
            if why is not None:
                self._note_blocked(composition, why)
                continue
            self._blocked.pop(composition, None)
            if self.waiting.head(composition) is not None:
                tokens = sum(n for other, n in draft.tokens.items() if other.request.composition == composition)
                heapq.heappush(heap, (self.waiting.served(composition) + tokens, order, composition))

    def _try_admit(self, seq: Sequence, draft: "_Draft") -> Blocked | None:
        if len(self.running) >= self.config.max_num_seqs:
            return Blocked.SEQUENCES
        if draft.budget == 0 or any(digest not in self.cache for digest in seq.digests):
            return Blocked.NOT_NOW
        in_use = {digest for other in self.running for digest in other.digests}
        if not self.places.can_hold(seq.digests, in_use):
            return Blocked.ADAPTER
        shared = self.blocks.match_prefix(seq)
        if not self.blocks.can_allocate(self.blocks.num_blocks_for(seq.num_tokens) - len(shared), shared):
            return Blocked.SEQUENCES
        self.waiting.admit(seq.request.composition)
        for digest in seq.digests:
            self.cache.acquire(digest)
            if digest not in self.places:
                place = self.places.assign(digest, in_use | set(seq.digests), self.step)
                draft.adapter_loads[place] = self.cache.peek(digest)
            elif digest not in in_use:
                self.places.renew(digest, self.step)
        self.blocks.share(seq, shared)
        if not seq.was_admitted:
            seq.num_cached_tokens = min(seq.num_computed_tokens, seq.num_prompt_tokens)
            self.num_prefix_queries += seq.num_prompt_tokens
            self.num_prefix_hits += seq.num_cached_tokens
        seq.was_admitted = True
        seq.status = SequenceStatus.RUNNING
        seq.admitted_step = self.step
        self.running.append(seq)
        num_new_tokens = min(seq.num_new_tokens, draft.budget)
        has_room = self.blocks.grow(seq, seq.num_computed_tokens + num_new_tokens)
        assert has_room, "can_allocate promised these blocks"
        draft.take(seq, num_new_tokens)
        return None

    def _note_blocked(self, composition: Composition, why: Blocked) -> None:
        """Remember since when a composition that nothing runs of is kept from running."""
        if why is Blocked.NOT_NOW or self.waiting.num_running(composition):
            return
        since, _ = self._blocked.get(composition, (self.step, why))
        self._blocked[composition] = (since, why)

    def _preempt(self, seq: Sequence) -> None:
        self.num_preemptions += 1
        self.running.remove(seq)
        self._let_go(seq)
        seq.status = SequenceStatus.WAITING
        self.waiting.push(seq, front=True)  # before stop_running: what it was served still counts
        self.waiting.stop_running(seq)

    # -- ends -------------------------------------------------------------------------------------------------

    def _finish_reason(self, seq: Sequence) -> tuple[FinishReason | None, int | None]:
        params = seq.request.params
        if seq.num_output_tokens > params.min_tokens:
            last = seq.token_ids[-1]
            if last in params.stop_token_ids:
                return FinishReason.STOP, last
            if last in self.config.eos_token_ids and not params.ignore_eos:
                return FinishReason.STOP, None
        if seq.num_output_tokens >= params.max_tokens or seq.num_tokens >= self.config.max_model_len:
            return FinishReason.LENGTH, None
        return None, None

    def _fail(self, seq: Sequence, failure: Failure) -> SequenceOutput:
        self._finish(seq, FinishReason.ERROR)
        return SequenceOutput(seq.seq_id, finish_reason=FinishReason.ERROR, failure=failure)

    def _finish(self, seq: Sequence, reason: FinishReason) -> None:
        if seq.status is SequenceStatus.RUNNING:
            self.running.remove(seq)
            self._let_go(seq)
            self.waiting.stop_running(seq)
        else:
            self.waiting.remove(seq)
        seq.status = SequenceStatus.FINISHED
        seq.finish_reason = reason
        if self.waiting.head(seq.request.composition) is None:
            self._blocked.pop(seq.request.composition, None)

    def _let_go(self, seq: Sequence) -> None:
        self.blocks.free(seq)
        for digest in seq.digests:
            self.cache.release(digest)

    def check_integrity(self) -> None:
        self.blocks.check_integrity(self.running)
        self.cache.check_integrity()
        self.places.check_integrity()
        self.waiting.check_integrity(self.running)
        assert all(not seq.block_table for seq in self.waiting), "a waiting sequence holds blocks"
        for digest in self.places.digests:
            assert digest in self.cache, f"adapter {digest} stands in a place but not in RAM"
        for digest in {*self.cache, *self.cache.leased}:
            uses = sum(seq.digests.count(digest) for seq in self.running)
            assert self.cache.num_leases(digest) == uses, f"adapter {digest}: leases differ from uses"
            assert not uses or digest in self.places, f"adapter {digest} runs without a place"


class _Draft:
    """A batch in the making: the tokens given out so far and what is left of the budget."""

    def __init__(self, budget: int):
        self.budget = budget
        self.tokens: dict[Sequence, int] = {}
        self.adapter_loads: dict[int, LoRAWeights] = {}

    def take(self, seq: Sequence, num_tokens: int) -> None:
        self.tokens[seq] = num_tokens
        self.budget -= num_tokens

    def give_back(self, seq: Sequence) -> None:
        self.budget += self.tokens.pop(seq, 0)
