"""SafetensorsHeader: what a weights file says about its tensors, checked without reading a value.

    file: | 8 bytes: length n of the header, little endian | n bytes: JSON | data |
    JSON: {"__metadata__": {str: str}, name: {"dtype", "shape", "data_offsets": [begin, end]}, ...}

safetensors' own reader accepts files that an adapter never is (zero-size tensors, 200 000 tensors, 90 MB of
metadata, tensors of 100 000 dimensions), so the limits below come first and safetensors has the last word
(`read_header`).
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors import SafetensorError, safe_open

from loraplex.errors import AdapterInvalid, PickleRefused
from loraplex.lora.digest import open_regular
from loraplex.lora.text import listed, shown

# Two tensors a module: 126 layers of 405B shapes with 7 modules have 1 764; experts kept one by one reach
# tens of thousands. Beyond that it is no adapter, and every tensor costs time in every check.
MAX_TENSORS = 65_536
# Some 150 bytes a tensor: 48 layers of 128 experts with three linears each have a header of 5.5 MB.
MAX_HEADER_BYTES = 12 << 20
MAX_METADATA_BYTES = 64 << 10
DTYPE_BYTES: Mapping[str, int] = MappingProxyType({"F32": 4, "F16": 2, "BF16": 2})

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_CONVERT = (
    "Convert it where you trust it: python -c \"import torch, safetensors.torch as s; "
    "s.save_file({k: v.contiguous() for k, v in torch.load('adapter_model.bin', map_location='cpu', "
    "weights_only=True).items()}, 'adapter_model.safetensors')\""
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One matrix or vector: its safetensors dtype, shape, and first byte, counted from the data's."""

    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """The tensors of a file by name, its metadata, and where its data starts (a byte of the file)."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_start: int


def refuse_pickle_name(name: str) -> None:
    """Raise PickleRefused if a file of this name holds weights in a format that can run code."""
    if name.lower().endswith(_PICKLE_SUFFIXES):
        raise PickleRefused(
            f"{shown(name)} is a pickle file, and reading one can run code. Only safetensors is accepted. {_CONVERT}",
            param="weights",
        )


def read_header(path: Path) -> SafetensorsHeader:
    """The checked header of the regular file `path`. Raises AdapterInvalid, PickleRefused, OSError."""
    fd = open_regular(path)
    try:
        size = os.fstat(fd).st_size
        header = parse_header(os.pread(fd, 8 + MAX_HEADER_BYTES, 0), size)
    finally:
        os.close(fd)
    try:
        with safe_open(path, framework="numpy") as reader:
            names = set(reader.keys())
    except SafetensorError as cause:
        raise _invalid(f"safetensors refuses it: {shown(str(cause), 160)}") from None
    if names != set(header.tensors):
        raise _invalid(f"its header is ambiguous about {listed(sorted(names ^ set(header.tensors)))}")
    return header


def parse_header(start: bytes, file_size: int) -> SafetensorsHeader:
    """The header of a file of `file_size` bytes that begins with `start` (all of it, or past the header).

    Every tensor lies inside the file, and together they fill it without gaps or overlaps.
    Raises AdapterInvalid, and PickleRefused for what looks like a pickle.
    """
    length = int.from_bytes(start[:8], "little")
    if start[8:9] != b"{":  # a header's length may begin as a pickle does
        _refuse_other_formats(start)
    if len(start) < 8 or length > MAX_HEADER_BYTES:
        raise _invalid(
            f"its header would have {length} bytes, and the limit is {MAX_HEADER_BYTES}"
            if len(start) >= 8
            else f"it has {file_size} bytes, and a header alone has more"
        )
    if 8 + length > file_size:
        raise _invalid(f"it ends after {file_size} bytes, inside its header of {length} bytes")
    entries = _json_object(start[8 : 8 + length])
    metadata = _metadata(entries.pop("__metadata__", {}))
    if not 0 < len(entries) <= MAX_TENSORS:
        raise _invalid(f"it holds {len(entries)} tensors, and an adapter has 2 to {MAX_TENSORS}")
    tensors = {name: _tensor(name, entry) for name, entry in entries.items()}
    _check_layout(tensors, file_size - 8 - length)
    return SafetensorsHeader(MappingProxyType(tensors), MappingProxyType(metadata), 8 + length)


def _invalid(why: str) -> AdapterInvalid:
    return AdapterInvalid(
        f"The weights file is not a usable safetensors file: {why}. Send the adapter_model.safetensors that "
        "PEFT's save_pretrained wrote, and check that it was copied whole.",
        param="weights",
    )


def _refuse_other_formats(start: bytes) -> None:
    # a pickle starts with the sign 0x80 and its protocol; a torch file is a zip, an old one a tar, or a bare
    # pickle
    if start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")):
        raise PickleRefused(
            f"The weights file is a pickle, and reading one can run code. Only safetensors is accepted. {_CONVERT}",
            param="weights",
        )
    if start[:4] == b"GGUF":
        raise AdapterInvalid(
            "The weights file is GGUF (llama.cpp's format), which this server does not read. "
            "Send the PEFT adapter it was made from.",
            param="weights",
        )


def _json_object(text: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as cause:
        raise _invalid(f"its header is not valid JSON ({shown(str(cause))})") from None
    if not isinstance(entries, dict):
        raise _invalid("its header is not a JSON object")
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # safetensors takes one of two entries of the same name without a word
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("an object names the same key twice")
    return entries


def _metadata(value: Any) -> dict[str, str]:
    if not (isinstance(value, dict) and all(isinstance(text, str) for text in value.values())):
        raise _invalid("its __metadata__ is not an object of strings")
    if sum(len(key) + len(text) for key, text in value.items()) > MAX_METADATA_BYTES:
        raise _invalid(f"its __metadata__ has more than {MAX_METADATA_BYTES} characters")
    return value


def _tensor(name: str, entry: Any) -> TensorInfo:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)], **rest} if not rest:
            pass
        case _:
            raise _invalid(f"its entry for {shown(name, 160)} is not dtype, shape and data_offsets")
    if dtype not in DTYPE_BYTES:
        raise _invalid(f"{shown(name, 160)} is of type {shown(dtype)}, and adapters are F32, F16 or BF16")
    if len(shape) == 3:
        raise AdapterInvalid(
            f"The tensor {shown(name, 160)} has the shape {shown(shape)}, and an adapter's tensors are matrices and "
            "vectors: whole stacks of experts (modules_to_save) are not served. Use target_parameters for them.",
            param="weights",
        )
    if len(shape) not in (1, 2) or not all(type(size) is int and size > 0 for size in shape):
        raise _invalid(
            f"{shown(name, 160)} has the shape {shown(shape)}, and an adapter's matrices and vectors have two sizes or "
            "one, above 0"
        )
    info = TensorInfo(dtype, tuple(shape), begin)
    if begin < 0 or end - begin != info.nbytes:
        raise _invalid(
            f"{shown(name, 160)} of shape {shown(shape)} and type {dtype} needs {shown(info.nbytes)} bytes, "
            f"and its offsets say {shown(end - begin)}"
        )
    return info


def _check_layout(tensors: Mapping[str, TensorInfo], data_size: int) -> None:
    end = 0
    for name, info in sorted(tensors.items(), key=lambda item: item[1].offset):
        if info.offset != end:
            raise _invalid(f"{shown(name, 160)} starts at byte {shown(info.offset)} of the data where {end} is free")
        end += info.nbytes
    if end != data_size:
        raise _invalid(f"its tensors need {shown(end)} bytes of data, and it holds {data_size}")
