"""An engine on a tiny model that can be driven step by step and whose logits are recorded."""

import copy
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

import tiny
from loraplex.engine.config import EngineConfig
from loraplex.engine.copy_stream import CopyStream
from loraplex.engine.engine import Engine
from loraplex.engine.load_proof import make_reference, prove
from loraplex.engine.messages import AdapterUse, Composition, EngineRequest, FinishReason, SequenceOutput
from loraplex.engine.runner import ModelRunner
from loraplex.engine.sampling_params import SamplingParams
from loraplex.lora.weights import LoRAWeights
from loraplex.model.loader import BaseModel, measure_geometry, wrap_model
from loraplex.model.support import freeze_rope
from loraplex.ops import select_ops

EOS = 2


class RecordingRunner(ModelRunner):
    """Keeps every logits row by (sequence, position): the logits at p are about token p + 1."""

    recorded: dict[str, dict[int, Tensor]]

    def _results(self, batch, rows, logits):
        for entry, span in zip(batch.entries, rows, strict=True):
            of_seq = self.recorded.setdefault(entry.seq.seq_id, {})
            for i in range(span.end - span.start):
                of_seq[span.first_position + i] = logits[span.start + i].clone()
        return super()._results(batch, rows, logits)


@dataclass
class World:
    """One tiny base with a runner. `reference` is an untouched copy of the model, for oracles."""

    model_type: str
    reference: torch.nn.Module
    base: BaseModel
    runner: RecordingRunner
    config: EngineConfig  # the largest sizes: what the runner's tensors were made for
    is_batch_invariant: bool
    adapters: dict[str, LoRAWeights] = field(default_factory=dict)

    def add_adapters(
        self, ranks: Sequence[int], only: Iterable[str] | None = None, first_seed: int = 1, **kwargs
    ) -> list[str]:
        """Random adapters of these ranks; returns their digests."""
        digests = []
        kwargs.setdefault("dtype", self.base.dtype)
        for seed, rank in enumerate(ranks, first_seed):
            weights = tiny.make_adapter(self.base.targets, rank=rank, seed=seed, only=only, **kwargs)
            self.adapters[weights.digest] = weights
            digests.append(weights.digest)
        return digests

    def use(self, digest: str | None, scale: float = 1.0) -> Composition:
        return () if digest is None else (AdapterUse(digest, self.adapters[digest].nbytes, scale),)

    def read(self, digest: str) -> LoRAWeights:
        return self.adapters[digest]

    @contextmanager
    def engine(
        self, read: Callable[[str], LoRAWeights] | None = None, stream: CopyStream | None = None, **sizes
    ) -> Iterator[Engine]:
        """A fresh engine over the same model; integrity is checked at the end."""
        self.runner.recorded = {}
        for place in range(self.runner.pool.num_places):
            self.runner.pool.clear(place)
        self.runner.config = resized(self.config, **sizes)
        engine = Engine(self.runner, lambda digest, on_files: (read or self.read)(digest), stream=stream)
        try:
            yield engine
            engine.check_integrity()
        finally:
            engine.close()


def fingerprint(world: World) -> str:
    """Of every byte of the base's parameters."""
    digest = hashlib.sha256()
    for name in sorted(name.replace(".base.", ".") for name, _ in world.base.model.named_parameters()):
        digest.update(name.encode() + world.base.tensor_of(name).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def make_config(**sizes) -> EngineConfig:
    defaults = {
        "num_blocks": 96,
        "block_size": 8,
        "max_loras": 4,
        "max_num_seqs": 12,
        "max_num_batched_tokens": 48,
        "max_model_len": 192,
        "adapter_cache_bytes": 1 << 30,
        "eos_token_ids": frozenset({EOS}),
    }
    return EngineConfig(**{**defaults, **sizes})


def resized(config: EngineConfig, **sizes) -> EngineConfig:
    """`config` with other sizes; what the runner's tensors were made for may only shrink."""
    names = EngineConfig.__dataclass_fields__
    values = {name: getattr(config, name) for name in names}
    return EngineConfig(**{**values, **sizes})


def make_world(
    model_type: str = "llama", dtype: torch.dtype = torch.float32, ops=None, seed: int = 0, **sizes
) -> World:
    return make_world_of(tiny.make_model(model_type, seed=seed, dtype=dtype), model_type, ops, **sizes)


def make_world_of(
    model: PreTrainedModel, model_type: str, ops=None, base: BaseModel | None = None, capture=None, **sizes
) -> World:
    """A world around a model that is in memory; runs the proof at load. With a `base` of its own, `model` is its
    reference."""
    original = copy.deepcopy(model) if base is None else model
    base = base or wrap_model(model)
    config = make_config(**sizes)
    for one in (original, base.model):
        freeze_rope(one, config.max_model_len)
    ops = ops or select_ops("cpu")
    if hasattr(ops, "warm_up"):
        ops.warm_up(base.dtype)
    reference = make_reference(base.model, base.vocab_size)
    geometry = measure_geometry(base.model)
    runner = RecordingRunner(base, geometry, config, ops, capture)
    runner.recorded = {}
    proof = prove(runner, reference)
    runner.recorded = {}
    return World(model_type, original, base, runner, runner.config, proof.is_batch_invariant)


def request(
    seq_id: str, token_ids: Sequence[int], composition: Composition = (), choice: int = 0, salt: bytes = b"", **params
) -> EngineRequest:
    """Greedy and without end unless `params` say otherwise."""
    chosen = {"temperature": 0.0, "ignore_eos": True, "max_tokens": 8, **params}
    return EngineRequest(
        seq_id=seq_id,
        token_ids=tuple(token_ids),
        params=SamplingParams(**chosen),
        composition=composition,
        choice=choice,
        salt=salt,
    )


@dataclass
class Outcome:
    tokens: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    outputs: list[SequenceOutput] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def take(self, step: int, output: SequenceOutput) -> None:
        self.outputs.append(output)
        if output.token_id is not None:
            self.tokens.append(output.token_id)
            self.steps.append(step)
        if output.finish_reason is not None:
            assert self.finish_reason is None, "a sequence ended twice"
            self.finish_reason = output.finish_reason


class Driver:
    """Runs an engine and sorts its outputs by sequence."""

    def __init__(self, engine: Engine, check: bool = True):
        self.engine = engine
        self.outcomes: dict[str, Outcome] = {}
        self._check = check

    def add(self, new: EngineRequest) -> None:
        refused = self.engine.add(new)
        outcome = self.outcomes.setdefault(new.seq_id, Outcome())
        if refused is not None:
            outcome.take(-1, refused)

    def abort(self, seq_id: str) -> None:
        self.engine.abort(seq_id)

    def step(self) -> None:
        output = self.engine.step()
        for one in output.outputs:
            self.outcomes[one.seq_id].take(output.step, one)
        if self._check:
            self.engine.check_integrity()
        if self.engine.is_stalled and self.engine.has_work:
            time.sleep(0.001)  # only a load can change anything; the async engine waits for its message here

    def run(self, max_steps: int = 20_000) -> dict[str, Outcome]:
        steps = 0
        while self.engine.has_work:
            self.step()
            steps += 1
            assert steps < max_steps, "the engine makes no progress"
        return self.outcomes


def random_ids(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, tiny.VOCAB, (count,), generator=generator).tolist()
