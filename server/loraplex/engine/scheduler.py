"""Scheduler: which tokens run in the next step, with which adapters in which places. Pure Python, no torch.

One `schedule()` decides everything a step needs: loads from disk ahead of need, leases, places, blocks, tokens. Places
are assigned in the same call that lists the sequences that use them, so a map from tokens to places is never stale.

A sequence that runs holds leases on its adapters and blocks for its tokens; one that waits or was preempted holds
neither. Everything is taken at once on admission, so nothing is held while waiting for something else.

Fairness: lines (the sequences of one composition) are served in the order of `WaitingQueue`. An overdue line, one of
which nothing runs and that has waited for `fairness_quantum` steps, goes first and turns out running sequences whose
turn is over, the most served before others; what it still lacks is given to nobody behind it. A turn is over
    of an adapter (place, RAM)    `quantum` steps after it was given to sequences while none used it
    of a sequence (slot, blocks)  `quantum` steps after the first token since its admission
and a sequence that was turned out before its turn brought a token is not turned out again before the second kind of
end: so every other turn brings at least a token, and nothing runs for ever without getting anywhere.

So, with q the quantum, P places, N = max_num_seqs and W lines that have been idle for longer, a line whose adapters are
in RAM runs at the latest after (C the steps in which the prompts of the turned out were computed, 0 for adapters that
set nobody back)
    (W // P + 2) · q          steps, when it lacks a place for one adapter,
    (W // N + 2) · (q + C)    steps, when it lacks one of the N slots,
    (W + 2) · (q + C)         steps, when it lacks KV blocks or places for several adapters,
and later by its own loads from disk and copies to the device, with one more quantum for each that lets its turn go by.
"""

import heapq
from collections.abc import Callable, Collection, Iterable
from enum import Enum, auto
from typing import TYPE_CHECKING, Protocol

from loraplex.engine.adapter_cache import AdapterCache
from loraplex.engine.adapter_places import AdapterPlaces
from loraplex.engine.adapter_swaps import AdapterSwaps
from loraplex.engine.block_manager import BlockManager
from loraplex.engine.config import EngineConfig
from loraplex.engine.draft import Draft
from loraplex.engine.messages import AdapterUse, Failure, FinishReason, SequenceOutput
from loraplex.engine.scheduled_batch import RowResult, ScheduledBatch
from loraplex.engine.sequence import Sequence, SequenceStatus
from loraplex.engine.waiting_queue import Line, WaitingQueue

if TYPE_CHECKING:
    from loraplex.engine.adapter_copies import FinishedCopy
    from loraplex.engine.adapter_loads import FinishedLoad


class StartsLoads(Protocol):
    def start(self, digest: str) -> None: ...


class Obstacle(Enum):
    """What is in the way of a sequence whose adapters are in RAM."""

    PLACES = auto()  # other adapters in the pool
    SEQUENCES = auto()  # other sequences, by number or by their KV blocks


class Scheduler:
    def __init__(
        self,
        config: EngineConfig,
        cache: AdapterCache,
        places: AdapterPlaces,
        blocks: BlockManager,
        loads: StartsLoads,
        swaps: AdapterSwaps | None = None,
    ):
        """`swaps` None: an adapter is in its place as soon as it has one (on a CPU a place is but an address)."""
        self.config = config
        self.swaps = swaps
        self.cache = cache
        self.places = places
        self.blocks = blocks
        self.waiting = WaitingQueue(config.fairness_quantum)
        self.running: list[Sequence] = []
        self.step = 0
        self.num_preemptions = 0
        self.num_prefix_queries = 0  # prompt tokens looked up in the prefix cache, and found there
        self.num_prefix_hits = 0
        self._loads = loads
        self._loading: set[str] = set()
        self._num_arrivals = 0

    # -- coming and going -------------------------------------------------------------------------------------

    def add(self, seq: Sequence) -> None:
        seq.arrival = self._num_arrivals
        self._num_arrivals += 1
        self.waiting.push(seq, self.step)

    def abort(self, seq: Sequence) -> None:
        self._finish(seq, FinishReason.ABORT)

    @property
    def sequences(self) -> list[Sequence]:
        return [*self.running, *self.waiting]

    @property
    def loading(self) -> frozenset[str]:
        """The adapters that are being read from disk."""
        return frozenset(self._loading)

    # -- the step ---------------------------------------------------------------------------------------------

    def schedule(self) -> ScheduledBatch:
        self.step += 1
        draft = Draft(self.config.max_num_batched_tokens)
        lines = self.waiting.in_order(self.step)
        self._start_loads(lines, draft)
        if self.swaps is not None:
            self.swaps.prefetch(lines, self.step)
        self._schedule_running(draft)
        self._admit(lines, draft)
        return draft.batch(self.step, self.places)

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
                    if seq.first_token_step is None:
                        seq.first_token_step = self.step
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
        """End every sequence of a step that went wrong. What it computed is not offered to others, and the adapters
        it was to load may not have arrived in their places."""
        for _, weights in batch.adapter_loads:
            self.places.release(weights.digest)
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

    def finish_copy(self, copy: "FinishedCopy") -> list[SequenceOutput]:
        """Let sequences use what was copied, or end those that waited for what did not arrive."""
        assert self.swaps is not None
        self.swaps.finish(copy.digest, has_arrived=copy.failure is None)
        if copy.failure is None:
            return []
        return [self._fail(seq, copy.failure) for seq in list(self.waiting) if copy.digest in seq.digests]

    def load(self, use: AdapterUse) -> bool:
        """Have an adapter read that no sequence waits for, into room that none of them needs; False: not now."""
        if use.digest in self.cache or use.digest in self._loading:
            return True
        protected = {digest for line in self.waiting.lines for digest in line.digests}
        if len(self._loading) >= self.config.max_concurrent_loads:
            return False
        if not self.cache.reserve(use.digest, use.nbytes, protected):
            return False
        self._loading.add(use.digest)
        self._loads.start(use.digest)
        return True

    def refuse_hopeless(self) -> list[SequenceOutput]:
        """End the waiting sequences that could never run, whatever happens before them."""
        return [*self._refuse_unscalable(), *self._refuse_beside_pins()]

    def _refuse_unscalable(self) -> list[SequenceOutput]:
        """An adapter that is more than deltas (DoRA's gains, biases, replaced modules or token rows) has no meaning in
        a sum of adapters or at another scale. Known once it is resident; refused before it could fail its
        neighbours."""
        message = (
            "An adapter with DoRA, trained biases, modules_to_save or trained token rows is served alone and at scale "
            "1, not in a composition. Name it by itself."
        )
        failure = Failure("invalid_request", message)
        outputs = []
        for line in self.waiting.lines:
            is_plain = not line.composition or [use.scale for use in line.composition] == [1.0]
            if not is_plain and any(d in self.cache and not self.cache.peek(d).is_additive for d in line.digests):
                outputs += [self._fail(seq, failure) for seq in list(line.waiting)]
        return outputs

    def _refuse_beside_pins(self) -> list[SequenceOutput]:
        if not self.cache.has_pins:
            return []
        hopeless = [seq for seq in self.waiting if not self.cache.can_ever_hold(seq.request.composition)]
        message = (
            "The adapter does not fit into RAM beside the pinned ones. Unpin some, or start the server with a larger "
            "--adapter-cache-bytes."
        )
        return [self._fail(seq, Failure("adapter_too_large", message)) for seq in hopeless]

    # -- parts of schedule() ----------------------------------------------------------------------------------

    def _start_loads(self, lines: list[Line], draft: Draft) -> None:
        """Look ahead over the queue in the order of service and bring adapters into RAM.

        What comes earlier keeps its room: nothing it needs is evicted for something later, and nothing later is loaded
        past one that finds no room, or a large adapter would never find any. Only the first line that needs a load
        turns others out for it: those before it are about to run and free some.
        """
        protected: set[str] = set()
        is_first = True
        for line in lines:
            protected |= line.digests
            missing = [u for u in line.composition if u.digest not in self.cache and u.digest not in self._loading]
            for use in missing:
                if len(self._loading) >= self.config.max_concurrent_loads:
                    return
                if not self._reserve(use, line, protected, draft, may_turn_out=is_first):
                    return
                self._loading.add(use.digest)
                self._loads.start(use.digest)
            if line.digests and all(digest in self.cache for digest in line.digests):
                is_first = False

    def _reserve(
        self, use: AdapterUse, line: Line, protected: Collection[str], draft: Draft, *, may_turn_out: bool
    ) -> bool:
        if self.cache.reserve(use.digest, use.nbytes, protected):
            return True
        if not may_turn_out or not self.waiting.is_overdue(line, self.step):
            return False

        def is_enough(leaving: list[Sequence]) -> bool:
            in_use = {digest for seq in self.running if seq not in leaving for digest in seq.digests}
            return self.cache.can_reserve(use.nbytes, protected, self.cache.leased - in_use - self.places.copying)

        if self._turn_out(self._adapters_due(protected), is_enough, draft):
            return self.cache.reserve(use.digest, use.nbytes, protected)
        draft.keeps_adapters = True
        return False

    def _schedule_running(self, draft: Draft) -> None:
        # Decodes first: a long prompt's chunk takes what is left of the budget, never another stream's next token.
        for seq in sorted(self.running, key=lambda seq: seq.num_new_tokens > 1):
            if seq.status is not SequenceStatus.RUNNING:  # preempted for another one a moment ago
                continue
            num_new_tokens = min(seq.num_new_tokens, draft.budget)
            if num_new_tokens and self._make_room(seq, seq.num_computed_tokens + num_new_tokens, draft):
                self._take(seq, num_new_tokens, draft)

    def _make_room(self, seq: Sequence, num_tokens: int, draft: Draft) -> bool:
        """Grow the blocks of a running sequence, preempting others until they suffice. False: it was `seq`.

        The youngest goes first, for it loses least; those that lost a turn already go last, the earliest arrival last
        of all, so that it gets its token.
        """
        while not self.blocks.grow(seq, num_tokens):
            victim = max(
                self.running,
                key=lambda s: (not s.was_set_back, 0 if s.was_set_back else s.admitted_step, s.arrival),
            )
            self._preempt(victim, draft)
            if victim is seq:
                return False
        return True

    def _admit(self, lines: list[Line], draft: Draft) -> None:
        heap = [(self.waiting.turn(line, self.step), line) for line in lines]
        heapq.heapify(heap)
        while heap:
            line = heapq.heappop(heap)[-1]
            seq = line.waiting[0]
            is_overdue = self.waiting.is_overdue(line, self.step)
            if not is_overdue and (draft.budget == 0 or len(self.running) >= self.config.max_num_seqs):
                return  # nor is any line after it
            if any(digest not in self.cache for digest in line.digests):
                continue  # its load is under way or cannot begin yet
            if draft.keeps_adapters and any(not self.cache.num_leases(digest) for digest in line.digests):
                continue
            if self.swaps is not None and not self.swaps.have_arrived(line.digests):
                if is_overdue:
                    self._make_places(line, lines, self.swaps, draft)
                continue  # its copy is under way or cannot begin yet
            obstacle = self._obstacle(seq)
            if obstacle is not None and is_overdue and self._make_way(seq, obstacle, draft):
                obstacle = None
            if obstacle is None and draft.budget:
                self._start(line, draft)
                if line.waiting:
                    heapq.heappush(heap, (self.waiting.turn(line, self.step), line))
            elif is_overdue and obstacle is Obstacle.SEQUENCES:
                return  # the next blocks and the next slot are its own
            elif is_overdue and obstacle is Obstacle.PLACES:
                draft.keeps_adapters = True

    def _obstacle(self, seq: Sequence, leaving: Collection[Sequence] = ()) -> Obstacle | None:
        """What keeps a waiting `seq` from running, once the running sequences `leaving` are gone."""
        in_use = (
            {digest for other in self.running if other not in leaving for digest in other.digests}
            if leaving
            else self.cache.leased
        )
        if not self.places.can_hold(seq.digests, in_use):
            return Obstacle.PLACES
        if len(self.running) - len(leaving) >= self.config.max_num_seqs or not self.blocks.can_hold(seq, leaving):
            return Obstacle.SEQUENCES
        return None

    def _make_way(self, seq: Sequence, obstacle: Obstacle, draft: Draft) -> bool:
        """Turn out running sequences whose turn is over until `seq` can run, in this very step."""

        def is_enough(leaving: list[Sequence]) -> bool:
            budget = draft.budget + sum(draft.tokens.get(other, 0) for other in leaving)
            return budget > 0 and self._obstacle(seq, leaving) is None

        due = self._adapters_due(seq.digests) if obstacle is Obstacle.PLACES else []
        return self._turn_out([*due, *self._sequences_due()], is_enough, draft)

    def _make_places(self, line: Line, lines: list[Line], swaps: AdapterSwaps, draft: Draft) -> None:
        """Have the adapters of an overdue `line` copied now, turning out running sequences whose turn is over where
        they are in the way. What it still lacks is given to nobody behind it, and it takes nothing from those before
        it: the places that they wait to use are theirs."""
        kept = {digest for earlier in lines[: lines.index(line)] for digest in earlier.digests if digest in self.places}

        def is_enough(leaving: list[Sequence]) -> bool:
            in_use = {digest for seq in self.running if seq not in leaving for digest in seq.digests}
            return self.places.can_hold(line.digests, in_use | kept)

        due = [*self._adapters_due(line.digests | kept), *self._sequences_due()]
        if is_enough([]) or self._turn_out(due, is_enough, draft):
            has_begun = swaps.start(line.waiting[0].digests, kept, self.step)
            assert has_begun, "can_hold promised these places"
        else:
            draft.keeps_adapters = True

    def _turn_out(
        self, groups: Iterable[list[Sequence]], is_enough: Callable[[list[Sequence]], bool], draft: Draft
    ) -> bool:
        """Preempt group after group until it `is_enough`; False and nothing changed when all of them are not."""
        leaving: list[Sequence] = []
        for group in groups:
            leaving += [seq for seq in group if seq not in leaving]
            if is_enough(leaving):
                for seq in leaving:
                    self._preempt(seq, draft)
                return True
        return False

    def _adapters_due(self, wanted: Collection[str]) -> list[list[Sequence]]:
        """The sequences of each adapter whose turn is over and that is not `wanted`, the most served first."""
        groups = []
        for digest in self.cache.leased.difference(wanted):
            if self.step - self.places.since(digest) >= self.config.fairness_quantum:
                users = [seq for seq in self.running if digest in seq.digests]
                if users and all(not seq.was_set_back or self._is_due(seq) for seq in users):
                    groups.append(users)
        return sorted(groups, key=lambda users: max(map(self._cost, users)), reverse=True)

    def _sequences_due(self) -> list[list[Sequence]]:
        """Each sequence whose turn is over, the most served first."""
        return [[seq] for seq in sorted(filter(self._is_due, self.running), key=self._cost, reverse=True)]

    def _is_due(self, seq: Sequence) -> bool:
        return seq.first_token_step is not None and self.step - seq.first_token_step >= self.config.fairness_quantum

    def _cost(self, seq: Sequence) -> tuple[int, int]:
        return self.waiting.line_of(seq).served, seq.arrival

    def _start(self, line: Line, draft: Draft) -> None:
        """Admit the head of `line`: it takes its leases, places and all its blocks at once."""
        seq = line.waiting[0]
        in_use = self.cache.leased
        for digest in seq.digests:
            self.cache.acquire(digest)
            if digest not in self.places:
                place = self.places.assign(digest, in_use | line.digests, self.step)
                draft.adapter_loads[place] = self.cache.peek(digest)
            elif digest not in in_use:
                self.places.renew(digest, self.step)
        self.blocks.share(seq, self.blocks.match_prefix(seq))
        has_room = self.blocks.grow(seq, seq.num_tokens)
        assert has_room, "can_hold promised these blocks"
        if not seq.was_admitted:
            seq.num_cached_tokens = min(seq.num_computed_tokens, seq.num_prompt_tokens)
            self.num_prefix_queries += seq.num_prompt_tokens
            self.num_prefix_hits += seq.num_cached_tokens
        seq.was_admitted = True
        seq.status = SequenceStatus.RUNNING
        seq.admitted_step = self.step
        seq.first_token_step = None
        self.waiting.admit(line)
        self.running.append(seq)
        self._take(seq, min(seq.num_new_tokens, draft.budget), draft)

    def _take(self, seq: Sequence, num_tokens: int, draft: Draft) -> None:
        draft.take(seq, num_tokens)
        self.waiting.line_of(seq).served += num_tokens

    def _preempt(self, seq: Sequence, draft: Draft) -> None:
        self.num_preemptions += 1
        self.waiting.line_of(seq).served -= draft.give_back(seq)
        self.running.remove(seq)
        self._let_go(seq)
        seq.status = SequenceStatus.WAITING
        seq.was_set_back = seq.first_token_step is None
        self.waiting.preempt(seq, self.step)

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
            self.waiting.stop_running(seq, self.step)
        else:
            self.waiting.remove(seq)
        seq.status = SequenceStatus.FINISHED
        seq.finish_reason = reason

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
            copies = int(digest in self.places.copying)
            assert self.cache.num_leases(digest) == uses + copies, f"adapter {digest}: leases differ from uses"
            assert not uses or self.places.has_arrived(digest), f"adapter {digest} runs and is not in its place"
