"""build_engine: from a model folder and a few sizes to an engine that has proven itself.

Everything here runs on the engine's own thread: kernels are compiled and bound there.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from loraplex.engine.adapter_loads import ReadAdapter
from loraplex.engine.config import EngineConfig
from loraplex.engine.copy_stream import CudaCopyStream
from loraplex.engine.engine import Engine
from loraplex.engine.load_proof import make_reference, prove
from loraplex.engine.memory import available_memory, total_memory
from loraplex.engine.runner import ModelRunner
from loraplex.engine.slab_arena import slab_allocator
from loraplex.errors import StartupError
from loraplex.lora.weights import AllocateSlab, ModuleShape, aligned, slab_numel
from loraplex.model.attention import LayerGeometry
from loraplex.model.devices import choose_device, choose_dtype, keep_large_blocks_apart, set_threads
from loraplex.model.linear import is_packed
from loraplex.model.loader import BaseModel, load_base, measure_geometry
from loraplex.model.quantization import Quantization
from loraplex.model.support import check_length, freeze_rope

DEFAULT_MAX_MODEL_LEN = 8192
MAX_CPU_PLACES = 128
DEFAULT_GPU_MEMORY_UTILIZATION = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """What the operator asked for. None and "auto" are decided at load.

    `kv_cache_bytes` None: on a CPU a fifth of the memory that is free after the weights, at most 2 GiB; on another
    device four fifths of what weights and pool leave (or what max_num_seqs full sequences need, if that is less); the
    rest is for the activations of a step.
    `gpu_memory_utilization`: share of an accelerator's memory, weights included, that may be planned with; None: 0.9.
    `graphs`: decoding is captured as CUDA graphs, for adapters of every rank up to max_lora_rank.
    `max_loras` None: 8; on a CPU, where a place is but an address, one for each sequence.
    """

    model: Path
    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = None
    max_loras: int | None = None
    max_lora_rank: int = 64
    adapter_cache_bytes: int = 2 << 30
    eviction: str = "lrfu"
    kv_cache_bytes: int | None = None
    gpu_memory_utilization: float | None = None
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512
    max_model_len: int | None = None
    max_waiting: int = 1024
    block_size: int = 16
    merge: str = "off"
    graphs: bool = False
    quantization: str | None = None
    extra_eos_token_ids: frozenset[int] = frozenset()

    def num_places(self, device: torch.device) -> int:
        """`max_loras`, decided."""
        return self.max_loras or (min(self.max_num_seqs, MAX_CPU_PLACES) if device.type == "cpu" else 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes. `packed_bytes`: packed copies beside a weight that is needed itself, as a tied head's is (CPU).
    `pool_bytes`: of the places and the proofs' one, 0 where they share the RAM tier's memory (CPU). `available_bytes`:
    what was left for KV cache and adapters."""

    weights_bytes: int
    packed_bytes: int
    kv_bytes: int
    kv_tokens: int
    pool_bytes: int
    ram_bytes: int
    available_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What the rest of the server must know of a built engine: picklable."""

    config: EngineConfig
    targets: Mapping[str, ModuleShape]
    fingerprint: str
    model_type: str
    num_parameters: int
    vocab_size: int
    dtype: str
    device: str
    threads: int
    is_batch_invariant: bool
    proof_error: float
    memory: MemoryPlan
    quantization: Quantization | None

    @property
    def bytes_per_value(self) -> int:
        return getattr(torch, self.dtype).itemsize


MakeReader = Callable[[BaseModel, AllocateSlab], ReadAdapter]
"""The base that is to be served, and where slabs come from -> the function that reads an adapter for it, by digest."""


def build_engine(
    spec: EngineSpec, make_reader: MakeReader, wake: Callable[[], None] = lambda: None
) -> tuple[Engine, EngineInfo]:
    """Load, prove and warm up. Raises StartupError naming what does not fit and the flag that changes it."""
    keep_large_blocks_apart()
    device = choose_device(spec.device)
    if device.index is not None:
        torch.cuda.set_device(device)  # Triton launches on the thread's current device, wherever the tensors are
    dtype = choose_dtype(spec.dtype, device)
    threads = set_threads(spec.threads, device)
    base = load_base(spec.model, dtype, device, spec.quantization)
    return assemble_engine(base, spec, make_reader, wake, threads=threads)


def assemble_engine(
    base: BaseModel,
    spec: EngineSpec,
    make_reader: MakeReader,
    wake: Callable[[], None] = lambda: None,
    *,
    threads: int = 1,
) -> tuple[Engine, EngineInfo]:
    """An engine around a base that is in memory already."""
    max_model_len, graph_rank = _max_model_len(spec, base), _graph_rank(spec, base)
    check_length(base.config, max_model_len)
    freeze_rope(base.model, max_model_len)
    # The proof's two sequences must fit the cache side by side; the smallest cache holds one full sequence.
    reference = make_reference(base.model, base.vocab_size, min(61, max_model_len // 2 - spec.block_size))
    geometry = measure_geometry(base.model)
    memory = plan_memory(spec, base, geometry, max_model_len)
    config = EngineConfig(
        max_num_seqs=spec.max_num_seqs,
        max_num_batched_tokens=max(spec.max_num_batched_tokens, spec.max_num_seqs),
        max_model_len=max_model_len,
        max_waiting=spec.max_waiting,
        block_size=spec.block_size,
        num_blocks=memory.kv_tokens // spec.block_size,
        max_loras=spec.num_places(base.device),
        place_bytes=_place_bytes(spec, base),
        adapter_cache_bytes=spec.adapter_cache_bytes,
        merge=spec.merge,
        graph_rank=graph_rank,
        eviction=spec.eviction,
        eos_token_ids=_ends_within(base.eos_token_ids | spec.extra_eos_token_ids, base.vocab_size),
    )
    allocate = slab_allocator(spec.adapter_cache_bytes, base.device)
    runner = ModelRunner(base, geometry, config)
    warm_up = getattr(runner.ops, "warm_up", None)
    if warm_up is not None:
        warm_up(base.dtype)
    _capture_graphs(runner)
    proof = prove(runner, reference)
    stream = CudaCopyStream(base.device) if base.device.type == "cuda" else None
    engine = Engine(runner, make_reader(base, allocate), wake, stream=stream)
    engine.proofs.prepare()
    info = EngineInfo(
        config=config,
        targets=base.targets,
        fingerprint=base.fingerprint,
        model_type=base.config.model_type,
        num_parameters=base.num_parameters,
        vocab_size=base.vocab_size,
        dtype=str(base.dtype).removeprefix("torch."),
        device=str(base.device),
        threads=threads,
        is_batch_invariant=proof.is_batch_invariant,
        proof_error=proof.error,
        memory=memory,
        quantization=base.quantization,
    )
    return engine, info


def plan_memory(
    spec: EngineSpec, base: BaseModel, geometry: Mapping[int, LayerGeometry], max_model_len: int
) -> MemoryPlan:
    """How the memory is divided; raises StartupError when it does not fit."""
    value = base.dtype.itemsize
    token_bytes = sum(layer.num_values for layer in geometry.values()) * value
    block_bytes = token_bytes * spec.block_size
    tied = [base.tensor_of(f"{name}.weight") for name, shape in base.targets.items() if shape.is_tied]
    packed_bytes = sum(weight.nbytes for weight in tied if is_packed(weight))
    available = max(0, available_memory(base.device) - packed_bytes - _withheld(spec, base.device))
    full_load = -(-max_model_len // spec.block_size) * spec.max_num_seqs * block_bytes
    one_sequence = -(-max_model_len // spec.block_size) * block_bytes
    on_cpu = base.device.type == "cpu"
    pool_bytes = _place_bytes(spec, base) * (spec.num_places(base.device) + 1)
    kv_bytes = spec.kv_cache_bytes
    if kv_bytes is None:
        share = min(available // 5, 2 << 30) if on_cpu else (available - pool_bytes) * 4 // 5
        kv_bytes = min(full_load, max(one_sequence, share))
    num_blocks = kv_bytes // block_bytes
    if num_blocks * block_bytes < one_sequence:
        raise StartupError(
            f"--kv-cache-bytes {kv_bytes} holds {num_blocks * spec.block_size} tokens, but one sequence may have "
            f"{max_model_len} and needs {one_sequence} bytes. Give more, or set a smaller --max-model-len."
        )
    needed = num_blocks * block_bytes + (spec.adapter_cache_bytes if on_cpu else pool_bytes)
    if needed > available:
        raise StartupError(
            f"The KV cache ({num_blocks * block_bytes} bytes) and the adapters "
            f"({needed - num_blocks * block_bytes} bytes) need {needed} bytes, and {available} are available on "
            f"{base.device}. {_HOW_TO_FIT['cpu' if on_cpu else 'device']}"
        )
    return MemoryPlan(
        weights_bytes=base.nbytes,
        packed_bytes=packed_bytes,
        kv_bytes=num_blocks * block_bytes,
        kv_tokens=num_blocks * spec.block_size,
        pool_bytes=pool_bytes,
        ram_bytes=spec.adapter_cache_bytes,
        available_bytes=available,
    )


def _place_bytes(spec: EngineSpec, base: BaseModel) -> int:
    """Of an adapter of the largest rank on every linear; on a CPU 0."""
    if base.device.type == "cpu":
        return 0
    ranks = ((s, spec.max_lora_rank) for s in base.targets.values() if s.kind in ("linear", "experts"))
    return aligned(slab_numel(ranks) * base.dtype.itemsize)


_HOW_TO_FIT = {
    "cpu": "Lower --kv-cache-bytes or --adapter-cache-bytes.",
    "device": "Lower --kv-cache-bytes, --max-model-len, --max-loras or --max-lora-rank, or raise "
    "--gpu-memory-utilization.",
}


def _withheld(spec: EngineSpec, device: torch.device) -> int:
    """Bytes of an accelerator's memory that the plan leaves alone, whoever else uses them."""
    if device.type == "cpu":
        if spec.gpu_memory_utilization is not None:
            raise StartupError(
                "--gpu-memory-utilization divides an accelerator's memory, and the base is on the CPU. Use "
                "--kv-cache-bytes and --adapter-cache-bytes."
            )
        return 0
    share = spec.gpu_memory_utilization or DEFAULT_GPU_MEMORY_UTILIZATION
    return round((1 - share) * total_memory(device))


def _graph_rank(spec: EngineSpec, base: BaseModel) -> int | None:
    if not spec.graphs:
        return None
    if base.device.type != "cuda":
        raise StartupError(f"CUDA graphs were asked for, and the device is {base.device}. Start without them.")
    if any(shape.kind == "experts" for shape in base.targets.values()):
        raise StartupError(
            f"CUDA graphs were asked for, and '{base.config.model_type}' is a mixture of experts: it sorts its rows on "
            "the host, which no graph can hold. Start without them."
        )
    return spec.max_lora_rank


def _capture_graphs(runner: ModelRunner) -> None:
    try:
        runner.capture_graphs()
    except RuntimeError as error:
        raise StartupError(
            f"No CUDA graph of '{runner.base.config.model_type}' can be captured: {error}. Start without them."
        ) from error


def _ends_within(token_ids: frozenset[int], vocab_size: int) -> frozenset[int]:
    """Only those the model can produce: a tokenizer may name an end token that the embedding has no row for."""
    return frozenset(token for token in token_ids if 0 <= token < vocab_size)


def _max_model_len(spec: EngineSpec, base: BaseModel) -> int:
    limit = base.max_position
    wanted = spec.max_model_len
    if wanted is None:
        return min(limit or DEFAULT_MAX_MODEL_LEN, DEFAULT_MAX_MODEL_LEN)
    if limit is not None and wanted > limit:
        raise StartupError(f"--max-model-len {wanted} is beyond what the model was made for ({limit} tokens).")
    if wanted < 4 * spec.block_size:
        raise StartupError(f"--max-model-len must be at least {4 * spec.block_size}.")
    return wanted
