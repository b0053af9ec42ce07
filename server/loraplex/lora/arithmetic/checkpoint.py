"""Checkpoint: the safetensors of a model folder, by the paths of the transformers model, one tensor at a time.

A folder may call its tensors otherwise than the model does: by an older name, without the model's first part, or with
the experts one by one. Whatever else lies between the two (a conversion of values) is refused where it is met.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loraplex.errors import StartupError
from loraplex.lora.expert_plan import expert_names
from loraplex.lora.keys import Renaming
from loraplex.lora.text import listed, shown
from loraplex.lora.weights import ModuleShape

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor, or one expert's part of it, is: `expert` and the rows `start` to `end` of that expert's weight
    [out, in]; expert -1: all of the tensor."""

    key: str
    expert: int = -1
    start: int = 0
    end: int = 0


class Checkpoint:
    """The model folder `folder`, whose modules are `targets`. Raises StartupError for what is no such folder."""

    def __init__(self, folder: Path, targets: Mapping[str, ModuleShape]):
        self.folder = folder
        self.targets = targets
        self.files = _files_by_key(folder)
        renamed = Renaming(targets)
        self._keys = {renamed(key): key for key in self.files}
        self._tied = {name for name, shape in targets.items() if shape.is_tied}
        self._embedding = next((name for name, shape in targets.items() if shape.kind == "embedding"), "")

    @property
    def paths(self) -> list[str]:
        """What the folder holds, by the model's names as far as they are known."""
        return list(self._keys)

    def key_of(self, path: str) -> str | None:
        """The key of the parameter `path`; None: it is not there under one key."""
        if path in self._keys:
            return self._keys[path]
        # a checkpoint of the model without its head has no first part: "h.0.attn…" for "transformer.h.0.attn…"
        return self._keys.get(path.partition(".")[2])

    def is_tied(self, path: str) -> bool:
        """Whether the parameter is the weight of a head that shares the embedding's."""
        name, _, parameter = path.rpartition(".")
        return name in self._tied and parameter == "weight"

    def places(self, path: str) -> list[Place]:
        """Where the parameter `path` is, part by part. Raises StartupError."""
        key = self.key_of(path)
        if key is not None:
            return [Place(key)]
        shape = self.targets.get(path)
        if shape is not None and shape.kind == "experts" and shape.parts:
            size = shape.out_features // len(shape.parts)
            found = []
            for expert in range(shape.num_experts):
                for index, part in enumerate(shape.parts):
                    names = expert_names(shape, f"{expert}.{part}.weight")
                    key = next((own for name in names if (own := self.key_of(name)) is not None), None)
                    if key is None:
                        raise self._lacks(names[-1])
                    found.append(Place(key, expert, index * size, (index + 1) * size))
            return found
        raise self._lacks(path)

    def tensor(self, key: str, expert: int | None = None) -> Tensor:
        """The tensor `key` as stored, or one expert's part of it. Raises StartupError where it is of no float type."""
        try:
            with safe_open(self.folder / self.files[key], framework="pt") as file:
                tensor = file.get_tensor(key) if expert is None else file.get_slice(key)[expert]
        except (OSError, SafetensorError) as cause:
            raise StartupError(f"{self.folder / self.files[key]} cannot be read: {cause}") from cause
        if tensor.dtype not in _DTYPES.values():
            raise StartupError(
                f"The tensor {shown(key, 160)} of {self.folder} is of type {tensor.dtype}; arithmetic needs float "
                "weights. Take the unquantised checkpoint."
            )
        return tensor

    def shape_of(self, key: str) -> tuple[int, ...]:
        """The shape of the tensor `key` as stored."""
        with safe_open(self.folder / self.files[key], framework="pt") as file:
            return tuple(file.get_slice(key).get_shape())

    def tensor_of(self, path: str) -> Tensor:
        """The parameter or buffer `path` whole, as the model has it. Raises KeyError."""
        if self.is_tied(path):
            path = f"{self._embedding}.weight"
        key = self.key_of(path)
        if key is not None:
            return self.tensor(key)
        if path not in self.targets:
            raise KeyError(path)
        shape = self.targets[path]
        parts = [self.tensor(place.key) for place in self.places(path)]
        return torch.cat(parts).view(shape.num_experts, shape.out_features, shape.in_features)

    def weight_of(self, shape: ModuleShape, expert: int = 0) -> Tensor:
        """The weight of `shape` as [out, in] in its own dtype; of experts, that of one; of an embedding
        [vocabulary, out]. Raises StartupError."""
        path = shape.name if shape.kind == "experts" else f"{shape.name}.weight"
        if self.is_tied(path):
            path = f"{self._embedding}.weight"
        places = [place for place in self.places(path) if place.expert in (-1, expert)]
        if shape.kind != "experts":
            weight = self.tensor(places[0].key)
        elif places[0].expert == -1:
            weight = self.tensor(places[0].key, expert)
        else:
            weight = torch.cat([self.tensor(place.key) for place in places])
        weight = weight.T if shape.transposed else weight
        expected = (shape.out_features, shape.in_features)
        if shape.kind == "embedding":
            expected = expected[::-1]
        if tuple(weight.shape) != expected:
            raise StartupError(
                f"{shown(path, 160)} has the shape {list(weight.shape)} in {self.folder} where {list(expected)} is "
                "expected. Check that the folder holds the model that its config.json describes."
            )
        return weight

    def _lacks(self, path: str) -> StartupError:
        return StartupError(
            f"{self.folder} has no tensor {shown(path, 160)}, or keeps it in a layout that is not known here. Save the "
            "model once with transformers' save_pretrained and take that folder."
        )


def _files_by_key(folder: Path) -> dict[str, str]:
    """File name by tensor."""
    try:
        if (folder / SINGLE).is_file():
            names = [SINGLE]
        else:
            index = json.loads((folder / INDEX).read_text())
            names = sorted(set(index["weight_map"].values()))
            if outside := [name for name in names if Path(name).name != name]:
                raise StartupError(f"{folder / INDEX} names the file {shown(outside[0])}, which is not in the folder.")
        found: dict[str, str] = {}
        for name in names:
            with safe_open(folder / name, framework="pt") as file:
                found |= dict.fromkeys(file.keys(), name)
    except FileNotFoundError as cause:
        raise StartupError(
            f"{folder} has no {SINGLE} and no whole {INDEX}. Give the folder of a transformers checkpoint in "
            "safetensors."
        ) from cause
    except (OSError, SafetensorError, ValueError, KeyError, AttributeError, TypeError) as cause:
        raise StartupError(f"The weights of {folder} cannot be read: {cause}. Copy the checkpoint again.") from cause
    if not found:
        raise StartupError(f"{folder} holds no tensors, only {listed(names)}.")
    return found
