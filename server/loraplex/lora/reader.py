"""AdapterReader: the two files of an adapter -> LoRAWeights.

    check(folder)   an upload or an operator's folder, not yet trusted    -> Checked or AdapterInvalid
    read(digest)    an accepted adapter, on its way from disk to RAM      -> LoRAWeights or AdapterLoadFailed

Files are read, not mapped: a disk error under a mapping kills the process, under a read it is an OSError.
Reading, hashing and converting let other threads run.
"""

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from loraplex.errors import AdapterInvalid, AdapterLoadFailed, LoraplexError
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
from loraplex.lora.headers import MAX_HEADER_BYTES, SafetensorsHeader, TensorInfo, parse_header, read_header
from loraplex.lora.peft import PeftConfig
from loraplex.lora.plan import AdapterPlan, plan
from loraplex.lora.text import shown
from loraplex.lora.weights import LoRAPair, LoRAWeights, ModuleShape, pack

WeightOf = Callable[[str], torch.Tensor]
"""Name of a LoRA module -> the base's weight [out_features, in_features]; name.bias -> its bias [out_features]."""

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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

    `dtype` is the compute dtype of the slab, `max_rank` the limit of --max-lora-rank, `weight_of` gives the base's
    weight [out, in] of a module, which DoRA's norms are of (not needed to `check`). Holds no state between calls, so
    any number of threads may share it.
    """

    def __init__(
        self,
        root: Path,
        targets: Mapping[str, ModuleShape],
        dtype: torch.dtype,
        max_rank: int,
        weight_of: WeightOf | None = None,
    ):
        self._root = root
        self._weight_of = weight_of
        self._targets = targets
        self._dtype = dtype
        self._max_rank = max_rank

    def read(self, digest: str) -> LoRAWeights:
        """The adapter `digest`, its files verified. Raises AdapterLoadFailed naming digest and cause."""
        try:
            folder = self._root / validate_digest(digest)
            config_bytes = _read_file(folder / CONFIG_NAME, MAX_CONFIG_BYTES)
            data = _read_file(folder / WEIGHTS_NAME)
            if _digest_of(folder, config_bytes, data) != digest:
                raise AdapterInvalid("its files no longer have the recorded SHA-256: the disk or someone changed them")
            header = parse_header(bytes(data[: 8 + MAX_HEADER_BYTES]), len(data))
            adapter_plan = self.plan(PeftConfig.from_bytes(bytes(config_bytes)), header)
            pairs = [self._finished(pair) for pair in _pairs(adapter_plan, header, data)]
            return pack(digest, pairs, self._dtype)
        except (OSError, LoraplexError, MemoryError) as cause:
            why = cause.message if isinstance(cause, LoraplexError) else f"{type(cause).__name__}: {cause}"
            raise AdapterLoadFailed(
                f"The adapter {digest[:64]} could not be loaded: {why}. Push the adapter again, or restore its files."
            ) from cause

    def check(self, folder: Path) -> Checked:
        """Everything that can be known of the adapter in `folder` before it is accepted.

        Raises AdapterInvalid or PickleRefused for what it holds, OSError for what cannot be read.
        """
        config_bytes = _read_file(folder / CONFIG_NAME, MAX_CONFIG_BYTES + 1)
        config = PeftConfig.from_bytes(bytes(config_bytes))
        header = read_header(folder / WEIGHTS_NAME)
        adapter_plan = self.plan(config, header)
        data = _read_file(folder / WEIGHTS_NAME)
        self._check_copies(adapter_plan, header, data)
        digest = _digest_of(folder, config_bytes, data)
        weights = pack(digest, _pairs(adapter_plan, header, data), self._dtype)
        check_values(weights, adapter_plan)
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

    def _check_copies(self, adapter_plan: AdapterPlan, header: SafetensorsHeader, data: memoryview) -> None:
        """Copies of the base's weights must be the base's, up to the rounding of the coarser of the two types."""
        for name, key in adapter_plan.copies.items():
            copy = _tensor(header.tensors[key], header.data_start, data)
            weight = None if self._weight_of is None else self._weight_of(name).cpu()
            if weight is None or not (
                torch.equal(copy.to(weight.dtype), weight) or torch.equal(copy, weight.to(copy.dtype))
            ):
                raise AdapterInvalid(
                    f"The tensor {shown(key, 160)} is a copy of the base's weight and differs from this base's: the "
                    "adapter was trained on another base, or changed this one. Serve it on the base it was trained on.",
                    param="weights",
                )

    def _finished(self, pair: LoRAPair) -> LoRAPair:
        """`pair` with DoRA's magnitudes turned into gains: gain = m / ‖W + scaling · B·A‖ over each output's row, and
        B multiplied by it (Liu et al. 2024, eq. 5, as PEFT's DoraLinearLayer computes it; in float32)."""
        if pair.gain is None:
            return pair
        if self._weight_of is None:
            raise AdapterInvalid("DoRA needs the base's weights, and this reader has none")
        a, b = pair.a.float(), pair.b.float()
        weight = self._weight_of(pair.shape.name)
        norm = torch.linalg.vector_norm(weight.float().cpu() + pair.scaling * (b @ a), dim=1)
        gain = pair.gain.float() / norm
        if not bool(torch.isfinite(gain).all()):
            raise AdapterInvalid(f"DoRA's gain of {pair.shape.name} is not finite: a row of the changed weight is zero")
        return replace(pair, a=a, b=gain.unsqueeze(1) * b, gain=gain)


def check_values(weights: LoRAWeights, adapter_plan: AdapterPlan) -> None:
    """Raise AdapterInvalid for a NaN or infinity (naming its tensor), and for an adapter without effect."""
    effect = False
    for module in adapter_plan.modules.values():
        a, bt = weights.a(module.shape), weights.bt(module.shape)
        gain, shift = weights.vectors(module.shape)
        for key, matrix in (
            (module.key_a, a),
            (module.key_b, bt),
            (module.key_magnitude, gain),
            (module.key_bias, shift),
        ):
            if key is None or matrix is None:
                continue
            if not bool(torch.isfinite(matrix).all()):
                raise AdapterInvalid(
                    f"The tensor {shown(key, 160)} holds NaN or infinity in "
                    f"{str(matrix.dtype).removeprefix('torch.')}, the type this server computes in. Check "
                    "the training run; its last steps may have diverged.",
                    param="weights",
                )
        effect = effect or (module.scaling != 0 and bool(a.any()) and bool(bt.any()))
    if not effect:
        raise AdapterInvalid(
            "The adapter is without effect: in every module lora_A or lora_B is zero, as before the first "
            "training step. Save it after training.",
            param="weights",
        )


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


def _pairs(adapter_plan: AdapterPlan, header: SafetensorsHeader, data: memoryview) -> list[LoRAPair]:
    """The file's tensors by module. DoRA's magnitudes stand where the gains will be."""

    def tensor(key: str | None) -> torch.Tensor | None:
        return None if key is None else _tensor(header.tensors[key], header.data_start, data)

    pairs = []
    for module in adapter_plan.modules.values():
        bias = tensor(module.key_bias)
        pairs.append(
            LoRAPair(
                module.shape,
                _tensor(header.tensors[module.key_a], header.data_start, data),
                _tensor(header.tensors[module.key_b], header.data_start, data),
                module.scaling * module.shape.output_scale,
                gain=tensor(module.key_magnitude),
                shift=None if bias is None else module.scaling * bias.float(),
            )
        )
    return pairs


def _tensor(info: TensorInfo, data_start: int, data: memoryview) -> torch.Tensor:
    begin = data_start + info.offset
    dtype = _DTYPES[info.dtype]
    if begin % dtype.itemsize:
        # a file may mix types, so that a float32 matrix starts between two multiples of 4
        return torch.frombuffer(bytearray(data[begin : begin + info.nbytes]), dtype=dtype).view(info.shape)
    return torch.frombuffer(data, dtype=dtype, count=info.nbytes // dtype.itemsize, offset=begin).view(info.shape)
