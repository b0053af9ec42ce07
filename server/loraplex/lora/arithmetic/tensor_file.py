"""TensorFile: a safetensors file whose tensors are written over in place, one at a time.

safetensors writes whole files only, and a shard is gigabytes. Its layout is the header's JSON and then the bytes (see
`headers`); a tensor of the same type and shape goes where the old one was.
"""

import json
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor


class TensorFile:
    """`path` is a file that safetensors has opened before, and whose header it therefore vouches for."""

    def __init__(self, path: Path):
        self._path = path
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        self._places = {key: (8 + length + entry["data_offsets"][0], entry) for key, entry in header.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry["data_offsets"][1] - entry["data_offsets"][0] for _, entry in self._places.values())

    def read(self, key: str) -> Tensor:
        with safe_open(self._path, framework="pt") as file:
            return file.get_tensor(key)

    def write(self, key: str, tensor: Tensor, index: int | None = None) -> None:
        """Put `tensor` where `key` is; with `index`, where that part of its first axis is."""
        start, entry = self._places[key]
        shape = tuple(entry["shape"])
        size = (entry["data_offsets"][1] - entry["data_offsets"][0]) // prod(shape)
        expected = shape if index is None else shape[1:]
        assert tuple(tensor.shape) == expected, f"{key} is of another shape"
        assert tensor.element_size() == size, f"{key} is of another type"
        with open(self._path, "r+b") as file:
            file.seek(start + (index or 0) * prod(expected) * size)
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
