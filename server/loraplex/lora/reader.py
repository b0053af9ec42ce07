"""AdapterReader: the two files of an adapter -> LoRAWeights.

    check(folder)   an upload or an operator's folder, not yet trusted    -> Checked or AdapterInvalid
    read(digest)    an accepted adapter, on its way from disk to RAM      -> LoRAWeights or AdapterLoadFailed

Files are read, not mapped: a disk error under a mapping kills the process, under a read it is an OSError.
Reading, hashing and converting let other threads run.
"""

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from cachetools import LRUCache

from loraplex.errors import AdapterInvalid, AdapterLoadFailed, LoraplexError
from loraplex.lora.assemble import Assembly, TensorOf
from loraplex.lora.digest import (
    CONFIG_NAME,
    MAX_CONFIG_BYTES,
    WEIGHTS_NAME,
    adapter_digest,
    open_regular,
    text_sha256,
    validate_digest,
)
from loraplex.lora.facts import AdapterFacts
from loraplex.lora.headers import MAX_HEADER_BYTES, SafetensorsHeader, parse_header, read_header
from loraplex.lora.norms import StoredNorms
from loraplex.lora.peft import PeftConfig
from loraplex.lora.plan import AdapterPlan, plan
from loraplex.lora.tensors import FileTensors
from loraplex.lora.text import shown
from loraplex.lora.weights import AllocateSlab, LoRAWeights, ModuleShape, allocate_slab, pack

_MAX_PLANNED_BYTES = 1 << 20  # of headers whose plans are kept; one of 84 modules has 20 KB


@dataclass(frozen=True, slots=True, eq=False)
class Checked:
    """An adapter that fits this base and has finite values and an effect. `nbytes` counts both files."""

    config: PeftConfig
    plan: AdapterPlan
    weights: LoRAWeights
    dtype: str
    nbytes: int

    @property
    def digest(self) -> str:
        return self.weights.digest

    @property
    def facts(self) -> AdapterFacts:
        """What the registry is to remember."""
        modules = self.plan.modules
        return AdapterFacts(
            rank=self.plan.max_rank,
            alpha=self.config.lora_alpha,
            use_rslora=self.config.use_rslora,
            num_modules=len(modules),
            target_modules=tuple(sorted({name.rpartition(".")[2] for name in modules})),
            dtype=self.dtype,
            nbytes=self.nbytes,
            num_values=self.weights.slab.numel(),
        )


class AdapterReader:
    """Reads the adapters below `root` (one folder a digest) for a base with these `targets`.

    `dtype` is the compute dtype of the slab, `max_rank` the limit of --max-lora-rank. `tensor_of` gives the base's
    tensors, which adapters that are more than deltas are read against, `fingerprint` names the base; without it nothing
    is stored. `allocate` gives the slabs of `read`. Any number of threads may share it.
    """

    def __init__(
        self,
        root: Path,
        targets: Mapping[str, ModuleShape],
        dtype: torch.dtype,
        max_rank: int,
        tensor_of: TensorOf | None = None,
        fingerprint: str | None = None,
        allocate: AllocateSlab = allocate_slab,
    ):
        self._allocate = allocate
        self._root = root
        self._tensor_of = tensor_of or _no_base
        self._norms = None if fingerprint is None else StoredNorms(fingerprint, dtype)
        self._targets = targets
        self._dtype = dtype
        self._max_rank = max_rank
        self._plans: LRUCache[tuple[bytes, bytes, int], tuple[SafetensorsHeader, AdapterPlan]]
        self._plans = LRUCache(_MAX_PLANNED_BYTES, getsizeof=lambda known: known[0].data_start)
        self._lock = threading.Lock()  # guards _plans

    def read(self, digest: str, on_files: Callable[[], object] = lambda: None) -> LoRAWeights:
        """The adapter `digest`, its files verified. `on_files` is called when they are in memory. Raises
        AdapterLoadFailed naming digest and cause."""
        try:
            folder = self._root / validate_digest(digest)
            config_bytes = _read_file(folder / CONFIG_NAME, MAX_CONFIG_BYTES)
            data = _read_file(folder / WEIGHTS_NAME)
            if _digest_of(folder, config_bytes, data) != digest:
                raise AdapterInvalid("its files no longer have the recorded SHA-256: the disk or someone changed them")
            on_files()
            header, adapter_plan = self._planned(bytes(config_bytes), data)
            assembly = Assembly(adapter_plan, FileTensors(header, data), self._tensor_of)
            if not assembly.gained:
                norms = {}
            elif self._norms is None:
                norms = assembly.norms()
            else:
                norms = self._norms.get(folder, assembly.gained, assembly.norms)
            return pack(digest, assembly.pairs(norms), self._dtype, assembly.replaced(), self._allocate)
        except (OSError, LoraplexError, MemoryError) as cause:
            why = cause.message if isinstance(cause, LoraplexError) else f"{type(cause).__name__}: {cause}"
            raise AdapterLoadFailed(
                f"The adapter {digest[:64]} could not be loaded: {why}. Push the adapter again, or restore its files."
            ) from cause

    def _planned(self, config: bytes, data: memoryview) -> tuple[SafetensorsHeader, AdapterPlan]:
        """Header and plan of an accepted adapter. Those of one recipe have the same: planning is Python, and takes
        longer than the rest that keeps other threads waiting."""
        length = min(int.from_bytes(data[:8], "little"), MAX_HEADER_BYTES)
        key = config, bytes(data[: 8 + length]), len(data)
        with self._lock:
            known = self._plans.get(key)
        if known is None:
            header = parse_header(key[1], len(data))
            known = header, self.plan(PeftConfig.from_bytes(config), header)
            if header.data_start <= _MAX_PLANNED_BYTES:
                with self._lock:
                    self._plans[key] = known
        return known

    def check(self, folder: Path, digest: str | None = None) -> Checked:
        """Everything that can be known of the adapter in `folder` before it is accepted. `digest`: of its files, if it
        is known already.

        Raises AdapterInvalid or PickleRefused for what it holds, OSError for what cannot be read.
        """
        config_bytes = _read_file(folder / CONFIG_NAME, MAX_CONFIG_BYTES + 1)
        config = PeftConfig.from_bytes(bytes(config_bytes))
        header = read_header(folder / WEIGHTS_NAME)
        adapter_plan = self.plan(config, header)
        data = _read_file(folder / WEIGHTS_NAME)
        tensors = FileTensors(header, data)
        self._check_copies(adapter_plan, tensors)
        assembly = Assembly(adapter_plan, tensors, self._tensor_of)
        digest = digest or _digest_of(folder, config_bytes, data)
        weights = pack(digest, assembly.pairs(norms=None), self._dtype, assembly.replaced())
        check_values(weights, adapter_plan, self._tensor_of)
        dtypes = {info.dtype for info in header.tensors.values()}
        return Checked(config, adapter_plan, weights, "+".join(sorted(dtypes)), len(config_bytes) + len(data))

    def plan(self, config: PeftConfig, header: SafetensorsHeader) -> AdapterPlan:
        """`plan` for this base, within the rank limit. Raises AdapterInvalid."""
        result = plan(config, header, self._targets)
        if result.max_rank > self._max_rank:
            raise AdapterInvalid(
                f"The adapter has rank {result.max_rank}; this server's limit is {self._max_rank}. "
                f"Start the server with --max-lora-rank {result.max_rank}, or train a smaller rank.",
                param="config",
            )
        return result

    def _check_copies(self, adapter_plan: AdapterPlan, tensors: FileTensors) -> None:
        """Copies of the base's tensors must be the base's, up to the rounding of the coarser of the two types."""
        for path, key in adapter_plan.copies.items():
            copy = tensors[key]
            try:
                own = self._tensor_of(path).cpu()
            except KeyError:
                raise AdapterInvalid(
                    f"The tensor {shown(key, 160)} is for {shown(path, 160)}, which this base does not have. Check "
                    "that the adapter was trained on this base.",
                    param="weights",
                ) from None
            if not (torch.equal(copy.to(own.dtype), own) or torch.equal(copy, own.to(copy.dtype))):
                raise AdapterInvalid(
                    f"The tensor {shown(key, 160)} is a copy of the base's and differs from this base's: the "
                    "adapter was trained on another base, or changed this one without naming it in modules_to_save. "
                    "Serve it on the base it was trained on.",
                    param="weights",
                )
        for one, other in adapter_plan.twins:
            if not torch.equal(tensors[one], tensors[other]):
                raise AdapterInvalid(
                    f"The tensors {shown(one, 160)} and {shown(other, 160)} are the same in training and differ in the "
                    "file. Save the adapter again.",
                    param="weights",
                )


def _no_base(path: str) -> torch.Tensor:
    raise AdapterInvalid(f"The adapter is read against the base's {path}, and this reader has no base.")


def check_values(weights: LoRAWeights, adapter_plan: AdapterPlan, tensor_of: TensorOf) -> None:
    """Raise AdapterInvalid for a NaN or infinity (naming its tensor), and for an adapter without effect."""
    has_effect = False
    for module in adapter_plan.modules.values():
        if not has_effect and module.shape.kind != "leaf":
            a, bt, extra = weights.a(module.shape), weights.bt(module.shape), weights.extra(module.shape)
            has_shift = extra is not None and extra.shift is not None and bool(extra.shift.any())
            has_effect = has_shift or (module.scaling != 0 and bool(a.any()) and bool(bt.any()))
    has_effect = has_effect or any(
        _differs(weights, name, parameter, tensor_of) for name, own in weights.replaced.items() for parameter in own
    )
    for key, tensor in _tensors_of(weights, adapter_plan):
        if not _is_finite(tensor):
            raise AdapterInvalid(
                f"The tensor {shown(key, 160)} holds NaN or infinity in "
                f"{str(tensor.dtype).removeprefix('torch.')}, the type this server computes in. Check "
                "the training run; its last steps may have diverged.",
                param="weights",
            )
    if not has_effect:
        raise AdapterInvalid(
            "The adapter is without effect: in every module lora_A or lora_B is zero, as before the first "
            "training step. Save it after training.",
            param="weights",
        )


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether every value is. By the smallest and the largest, which NaN and infinities come through: a twelfth of the
    time of looking at each."""
    return not tensor.numel() or all(bool(end.isfinite()) for end in torch.aminmax(tensor))


def _differs(weights: LoRAWeights, name: str, parameter: str, tensor_of: TensorOf) -> bool:
    """Whether what takes the place of the base's parameter is something else."""
    own = weights.replaced[name][parameter]
    base = tensor_of(f"{name}.{parameter}").cpu()
    base = base if own.rows is None else base[own.rows]
    ours = weights.slab[own.offset : own.offset + prod(own.shape)].view(own.shape)
    forms = (base, base.T) if base.ndim == 2 else (base,)  # a Conv1D stores it the other way round
    return not any(torch.equal(ours, one.to(ours.dtype)) for one in forms)


def _tensors_of(weights: LoRAWeights, adapter_plan: AdapterPlan) -> Iterator[tuple[str, torch.Tensor]]:
    """Everything in the slab, with a key of the file that it came from."""
    for module in adapter_plan.modules.values():
        shape, name = module.shape, module.name_in_file
        if shape.kind == "leaf":
            continue
        if module.rank:
            yield module.key_of("A") or name, weights.a(shape)
            yield module.key_of("B") or name, weights.bt(shape)
        extra = weights.extra(shape)
        if extra is not None and extra.gain is not None:
            yield module.keys["magnitude"], extra.gain
        if extra is not None and extra.shift is not None:
            yield module.keys.get("bias") or module.trained_bias or name, extra.shift
    keys = {(one.shape.name, one.parameter): one.key for one in adapter_plan.replaced}
    for name, parameters in weights.replaced.items():
        for parameter, one in parameters.items():
            fallback = f"{name}.{parameter}"  # a LoRA that was folded into it
            yield keys.get((name, parameter), fallback), weights.slab[one.offset : one.offset + prod(one.shape)]


def _digest_of(folder: Path, config: memoryview, weights: memoryview) -> str:
    return adapter_digest(hashlib.sha256(config).digest(), hashlib.sha256(weights).digest(), text_sha256(folder))


def _read_file(path: Path, limit: int | None = None) -> memoryview:
    """The bytes of a regular file (at most `limit`), writable so that tensors can be views of them."""
    fd = open_regular(path)
    with open(fd, "rb", buffering=0) as file:
        size = os.fstat(fd).st_size
        # not a bytearray: that would first be filled with zeros while no other thread runs
        data = torch.empty(size if limit is None else min(size, limit), dtype=torch.uint8).numpy().data
        done = 0
        while done < len(data):
            count = file.readinto(data[done:])
            if not count:
                raise OSError(f"{path} ends after {done} of {len(data)} bytes")
            done += count
    return data
