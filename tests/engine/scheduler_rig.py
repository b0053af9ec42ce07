"""A scheduler with fake weights, loads and device, and checks of every batch against them. No torch."""

from collections.abc import Sequence as Items
from dataclasses import dataclass

from loraplex.engine.adapter_cache import AdapterCache
from loraplex.engine.adapter_places import AdapterPlaces
from loraplex.engine.adapter_swaps import AdapterSwaps
from loraplex.engine.block_manager import BlockManager
from loraplex.engine.config import EngineConfig
from loraplex.engine.messages import AdapterUse, Composition, EngineRequest, Failure, FinishReason, SequenceOutput
from loraplex.engine.sampling_params import SamplingParams
from loraplex.engine.scheduled_batch import RowResult, ScheduledBatch
from loraplex.engine.scheduler import Scheduler
from loraplex.engine.sequence import Sequence
from loraplex.errors import AdapterLoadFailed, LoraplexError


@dataclass(frozen=True)
class FakeWeights:
    digest: str
    nbytes: int
    is_additive: bool = True


@dataclass(frozen=True)
class FakeLoad:
    digest: str
    weights: FakeWeights | None = None
    error: LoraplexError | None = None


class FakeLoads:
    """Loads take `steps` steps (by digest, else `default`); digests in `broken` fail."""

    def __init__(self, default: int = 0):
        self.default = default
        self.steps: dict[str, int] = {}
        self.broken: set[str] = set()
        self.started: list[str] = []
        self.under_way: dict[str, int] = {}

    def start(self, digest: str) -> None:
        assert digest not in self.under_way, "a load is not single-flight"
        self.started.append(digest)
        self.under_way[digest] = self.steps.get(digest, self.default)

    def finished(self) -> list[str]:
        """Those that end before the coming step."""
        done = [digest for digest, left in self.under_way.items() if left <= 0]
        for digest in done:
            del self.under_way[digest]
        for digest in self.under_way:
            self.under_way[digest] -= 1
        return done


@dataclass(frozen=True)
class FakeCopy:
    digest: str
    failure: Failure | None = None


class FakeCopies:
    """Copies take `steps` steps; those of digests in `broken` fail. `device`: place -> what stands there, None while a
    copy goes there."""

    def __init__(self, steps: int, device: dict[int, str | None]):
        self.steps = steps
        self.broken: set[str] = set()
        self.started: list[str] = []
        self.under_way: dict[str, int] = {}
        self.place_of: dict[str, int] = {}
        self._device = device

    def start(self, place: int, weights: FakeWeights) -> None:
        assert weights.digest not in self.under_way, "a copy is not single-flight"
        assert place not in [self.place_of[digest] for digest in self.under_way], "two copies go to one place"
        self.started.append(weights.digest)
        self.under_way[weights.digest] = self.steps
        self.place_of[weights.digest] = place
        self._device[place] = None

    def finished(self) -> list[FakeCopy]:
        """Those that end before the coming step."""
        done = []
        for digest, left in list(self.under_way.items()):
            self.under_way[digest] -= 1
            if left <= 0:
                del self.under_way[digest]
                is_broken = digest in self.broken
                done.append(FakeCopy(digest, Failure("broken", "") if is_broken else None))
                if not is_broken:
                    self._device[self.place_of[digest]] = digest
        return done


def uses(*names: str, nbytes: int = 1, scale: float = 1.0) -> Composition:
    return tuple(AdapterUse(name, nbytes, scale) for name in names)


def make_sequence(
    seq_id: str = "s",
    prompt: Items[int] = (1, 2, 3),
    composition: Composition = (),
    *,
    arrival: int = 0,
    salt: bytes = b"",
    **params,
) -> Sequence:
    chosen = {"temperature": 0.0, "ignore_eos": True, "max_tokens": 8, **params}
    request = EngineRequest(
        seq_id=seq_id, token_ids=tuple(prompt), params=SamplingParams(**chosen), composition=composition, salt=salt
    )
    return Sequence(request, arrival)


class Rig:
    """Drives a scheduler. The step of every token of every sequence is in `tokens`, the end of each in `ends`."""

    def __init__(self, *, load_steps: int = 0, copy_steps: int | None = None, check: bool = True, **sizes):
        """`copy_steps`: places have memory of their own, and a copy takes so many; None: a place is an address."""
        defaults = {
            "max_num_seqs": 8,
            "max_num_batched_tokens": 32,
            "max_model_len": 128,
            "block_size": 4,
            "num_blocks": 256,
            "max_loras": 3,
            "adapter_cache_bytes": 100,
            "fairness_quantum": 8,
        }
        self.config = EngineConfig(**{**defaults, **sizes})
        self.loads = FakeLoads(load_steps)
        self.places = AdapterPlaces(self.config.max_loras)
        self.cache = AdapterCache(self.config.adapter_cache_bytes, on_evict=self.places.release)
        self.blocks = BlockManager(self.config.num_blocks, self.config.block_size)
        self._device: dict[int, str | None] = {}
        self.copies = FakeCopies(copy_steps or 0, self._device)
        swaps = None
        if copy_steps is not None:
            swaps = AdapterSwaps(self.cache, self.places, self.copies, self.config.max_concurrent_copies)  # type: ignore
        self.scheduler = Scheduler(self.config, self.cache, self.places, self.blocks, self.loads, swaps)
        self.seqs: dict[str, Sequence] = {}
        self.bytes_of: dict[str, int] = {}
        self.tokens: dict[str, list[int]] = {}
        self.admitted: dict[str, int] = {}
        self.ends: dict[str, SequenceOutput] = {}
        self._check = check
        self._kv: dict[int, object] = {}

    @property
    def step_number(self) -> int:
        return self.scheduler.step

    def add(self, seq_id: str, composition: Composition = (), *, prompt: int | Items[int] = 4, **params) -> Sequence:
        token_ids = [hash((seq_id, i)) % 1000 for i in range(prompt)] if isinstance(prompt, int) else prompt
        seq = make_sequence(seq_id, token_ids, composition, **params)
        assert seq_id not in self.seqs
        self.seqs[seq_id] = seq
        self.tokens[seq_id] = []
        self.bytes_of |= {use.digest: use.nbytes for use in composition}
        self.scheduler.add(seq)
        return seq

    def abort(self, seq_id: str) -> None:
        if seq_id not in self.ends:
            self.scheduler.abort(self.seqs[seq_id])
            self.ends[seq_id] = SequenceOutput(seq_id, finish_reason=FinishReason.ABORT)

    def take_loads(self) -> None:
        for digest in self.loads.finished():
            if digest in self.loads.broken:
                load = FakeLoad(digest, error=AdapterLoadFailed("broken"))
            else:
                load = FakeLoad(digest, FakeWeights(digest, self.bytes_of[digest]))
            self._take(self.scheduler.finish_load(load))  # type: ignore[arg-type]

    def take_copies(self) -> None:
        for digest in self.copies.under_way:
            assert digest in self.cache, "a slab left RAM while it was copied"
            assert self.places.place_of(digest) == self.copies.place_of[digest], "its place was given to another"
        for copy in self.copies.finished():
            self._take(self.scheduler.finish_copy(copy))  # type: ignore[arg-type]

    def step(self) -> ScheduledBatch:
        self.take_loads()
        self.take_copies()
        self._take(self.scheduler.refuse_hopeless())
        batch = self.scheduler.schedule()
        for seq in self.scheduler.running:
            self.admitted.setdefault(seq.seq_id, self.step_number)
        self._check_batch(batch)
        self._take(self.scheduler.update(batch, [self._result(entry) for entry in batch.entries]))
        if self._check:
            self.scheduler.check_integrity()
        return batch

    def run(self, max_steps: int = 2000) -> None:
        for _ in range(max_steps):
            if not self.scheduler.sequences:
                return
            self.step()
        raise AssertionError(f"no end: {self.scheduler.sequences}")

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    def is_running(self, seq_id: str) -> bool:
        return self.seqs[seq_id] in self.scheduler.running

    def _result(self, entry) -> RowResult:
        samples = entry.is_last_chunk and entry.seq.request.params.max_tokens > 0
        return RowResult(token_id=entry.seq.num_tokens % 997 if samples else None)

    def _take(self, outputs: list[SequenceOutput]) -> None:
        for output in outputs:
            assert output.seq_id not in self.ends, "a sequence that ended speaks"
            if output.token_id is not None:
                self.tokens[output.seq_id].append(self.step_number)
            if output.finish_reason is not None:
                self.ends[output.seq_id] = output

    def _check_batch(self, batch: ScheduledBatch) -> None:
        """What the runner relies on."""
        config = self.config
        assert self.scheduler.swaps is None or not batch.adapter_loads, "a step copies an adapter"
        for place, weights in batch.adapter_loads:
            self._device[place] = weights.digest
        assert batch.num_tokens <= config.max_num_batched_tokens
        assert len(batch.entries) <= config.max_num_seqs
        assert batch.entries or not batch.adapter_loads, "loads of a step that is not run are lost"
        assert len({entry.seq.seq_id for entry in batch.entries}) == len(batch.entries)
        assert {entry.seq for entry in batch.entries} <= set(self.scheduler.running)
        neighbours = [entry.places for entry in batch.entries]
        assert neighbours == sorted(neighbours), "one adapter's tokens are not neighbours"
        assert len({place for places in neighbours for place in places}) <= config.max_loras
        waiting_decodes = [
            seq
            for seq in self.scheduler.running
            if seq.num_new_tokens == 1 and seq not in {e.seq for e in batch.entries}
        ]
        assert not waiting_decodes, "a stream misses a step"
        written: set[int] = set()
        for entry in batch.entries:
            seq = entry.seq
            assert entry.num_new_tokens > 0
            assert tuple(self._device[place] for place in entry.places) == seq.digests, "a wrong adapter in the place"
            if self._check:
                self._check_kv(entry, written)

    def _check_kv(self, entry, written: set[int]) -> None:
        """Every earlier position holds this sequence's own key, and nobody writes where another one reads."""
        seq, size = entry.seq, self.config.block_size
        key: object = (seq.request.composition, seq.request.salt)
        for position in range(seq.num_computed_tokens + entry.num_new_tokens):
            key = hash((key, seq.token_ids[position]))
            slot = seq.block_table[position // size] * size + position % size
            if position < seq.num_computed_tokens:
                assert self._kv[slot] == key, f"{seq} reads another one's key at {position}"
                assert slot not in written, "a slot is read and written in one step"
            else:
                assert slot not in written, "two sequences write one slot"
                written.add(slot)
                self._kv[slot] = key
