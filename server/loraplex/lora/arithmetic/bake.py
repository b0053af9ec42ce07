"""bake: base and adapter -> a model that answers as the two together.

The checkpoint's files are copied as they are and the changed tensors written into their places, so that no more than
one of them is in memory, and everything else stays byte for byte: types, shards, index, tokenizer, config. Only where
an adapter parts the head from an embedding whose weight it shared, a tensor is added and the config says so.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from loraplex.errors import AdapterInvalid, StartupError
from loraplex.lora.arithmetic.checkpoint import INDEX, SINGLE, Checkpoint, Place
from loraplex.lora.arithmetic.draft import Tick, no_tick
from loraplex.lora.arithmetic.factors import Factors
from loraplex.lora.arithmetic.patch import Change, Patch, delta_patch
from loraplex.lora.arithmetic.source import Source
from loraplex.lora.arithmetic.tensor_file import TensorFile
from loraplex.lora.files import PROFILE, TEXT_FILES
from loraplex.lora.norms import norm_of_rows
from loraplex.lora.text import shown
from loraplex.lora.weights import ModuleShape

# Weights in other formats would be another model beside this one; the card is the base's.
_LEFT_OUT = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".safetensors", ".index.json")
_CARD = "README.md"
_TEMPLATES = "additional_chat_templates"


@dataclass(frozen=True, slots=True)
class Baked:
    """`changes` by parameter; `copied`: files from the base's folder, `brought` from the adapter's. `is_untied`: the
    head has a weight of its own now."""

    changes: Mapping[str, Change]
    copied: tuple[str, ...]
    brought: tuple[str, ...]
    is_untied: bool
    notes: tuple[str, ...] = ()


def bake(source: Source, base: Checkpoint, folder: Path, tick: Tick = no_tick) -> Baked:
    """Write the model into the empty `folder`. Raises AdapterInvalid for what no model of this architecture can hold,
    StartupError for a base that cannot be read, OSError for what the disk refuses."""
    patches = _patches(source, base)
    for path in patches:
        _check_place(path, base)
    copied = _copy_files(base, folder)
    changes: dict[str, Change] = {}
    files = {name: TensorFile(folder / name) for name in set(base.files.values())}
    tied = {path: patch for path, patch in patches.items() if base.is_tied(path)}
    for done, (path, patch) in enumerate(patches.items()):
        if path not in tied:
            changes[path] = _write(path, patch, base, files)
        tick(done + 1, len(patches))
    is_untied = _untie(tied, base, folder, files, changes)
    brought, notes = _bring_texts(source, folder)
    return Baked(changes, copied, brought, is_untied, notes)


def _patches(source: Source, base: Checkpoint) -> dict[str, Patch | list[Patch]]:
    """By the parameter's path; of experts one for each."""
    patches: dict[str, Patch | list[Patch]] = {}
    weights = source.checked.weights
    for name in weights.modules:
        shape, extra = base.targets[name], weights.extra(base.targets[name])
        if weights.modules[name].rank:
            key = name if shape.kind == "experts" else f"{name}.weight"
            patches[key] = _delta(source, shape, base)
        if extra is not None and extra.shift is not None:
            patches[f"{name}.bias"] = Patch(shift=extra.shift.unsqueeze(1))
    for name, parameters in weights.replaced.items():
        extra = weights.extra(base.targets[name])
        assert extra is not None, "it has replaced parameters"
        for parameter in parameters:
            tensor = extra.replaced[parameter]
            tensor = tensor.T if base.targets[name].transposed and tensor.ndim == 2 else tensor
            rows = extra.rows if parameter == "weight" else None
            patches[f"{name}.{parameter}"] = Patch(own=tensor.reshape(len(tensor), -1), rows=rows)
    return patches


def _delta(source: Source, shape: ModuleShape, base: Checkpoint) -> Patch | list[Patch]:
    factors, extra = source.factors(shape.name), source.checked.weights.extra(shape)
    if shape.kind == "experts":
        return [delta_patch(shape, Factors(a, b), None) for a, b in zip(factors.a, factors.b, strict=True)]
    if extra is None or extra.gain is None:
        return delta_patch(shape, factors, None)
    weight = base.weight_of(shape)
    weight = weight.T if shape.kind == "embedding" else weight
    gain = extra.gain / norm_of_rows(weight, factors.a, factors.b, 1.0)
    return delta_patch(shape, Factors(factors.a, gain.unsqueeze(1) * factors.b), gain)


def _check_place(path: str, base: Checkpoint) -> None:
    """Every changed parameter is in the checkpoint, in the shape that the model has."""
    name, _, parameter = path.rpartition(".")
    shape = base.targets.get(path) or base.targets[name]
    if shape.kind != "experts" and parameter not in shape.parameters:
        raise AdapterInvalid(
            f"The adapter has a bias on {shown(name, 160)} (lora_bias), and this architecture has none there, so no "
            "checkpoint of it can hold the sum. Serve the adapter beside its base instead."
        )
    if base.is_tied(path):
        return
    for place in base.places(path):
        stored = base.shape_of(place.key)
        expected = _stored_shape(shape, place) if shape.kind == "experts" else shape.parameters[parameter]
        if stored != expected:
            raise StartupError(
                f"{base.folder} holds {shown(place.key, 160)} in the shape {list(stored)} where the model has "
                f"{list(expected)}: a layout that is not known here. Save the model once with transformers' "
                "save_pretrained and take that folder."
            )


def _stored_shape(shape: ModuleShape, place: Place) -> tuple[int, ...]:
    if place.expert >= 0:
        return (place.end - place.start, shape.in_features)
    sizes = (shape.out_features, shape.in_features)
    return (shape.num_experts, *(sizes[::-1] if shape.transposed else sizes))


def _write(path: str, patch: Patch | list[Patch], base: Checkpoint, files: Mapping[str, TensorFile]) -> Change:
    """Write a changed parameter into the place that the base's has."""
    change = Change()
    for place in base.places(path):
        file = files[base.files[place.key]]
        if isinstance(patch, Patch):
            file.write(place.key, patch.applied(base.tensor(place.key), path, change))
        elif place.expert >= 0:
            one = patch[place.expert]
            assert one.left is not None, "an expert's patch is a delta"
            part = Patch(one.left[place.start : place.end], one.right)
            file.write(place.key, part.applied(base.tensor(place.key), path, change))
        else:
            for expert, one in enumerate(patch):
                file.write(place.key, one.applied(base.tensor(place.key, expert), path, change), expert)
    return change


def _untie(
    tied: Mapping[str, Patch | list[Patch]],
    base: Checkpoint,
    folder: Path,
    files: Mapping[str, TensorFile],
    changes: dict[str, Change],
) -> bool:
    """Give a head that shared the embedding's weight one of its own where the two are no longer equal. PEFT's deltas
    and saved modules are of one of the two, its token rows of both."""
    heads = [shape for shape in base.targets.values() if shape.is_tied]
    embedding = next((f"{s.name}.weight" for s in base.targets.values() if s.kind == "embedding"), "")
    if not heads or not (tied or embedding in changes):
        return False
    path = f"{heads[0].name}.weight"
    old = base.tensor_of(path)
    patch, change = tied.get(path, Patch()), Change()
    assert isinstance(patch, Patch), "a head is no stack of experts"
    new = patch.applied(old, path, change)
    if path in tied:
        changes[path] = change
    key = base.key_of(embedding)
    assert key is not None, "the head's weight was read from there"
    if torch.equal(files[base.files[key]].read(key), new):
        return False
    _add_head(path, new, base, folder, files)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return True


def _add_head(path: str, weight: Tensor, base: Checkpoint, folder: Path, files: Mapping[str, TensorFile]) -> None:
    key = base.key_of(path)
    if key is not None and base.shape_of(key) == tuple(weight.shape):  # a copy that a tied model does not read
        files[base.files[key]].write(key, weight.to(base.tensor(key).dtype))
        return
    weight_map = dict(base.files)
    total = sum(file.nbytes for file in files.values()) + weight.nbytes
    first, added = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    if (folder / SINGLE).exists():
        (folder / SINGLE).rename(folder / first)
        weight_map = dict.fromkeys(weight_map, first)
    else:
        added = "model-untied-head.safetensors"
    save_file({path: weight.contiguous()}, folder / added, metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted({**weight_map, path: added}.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _copy_files(base: Checkpoint, folder: Path) -> tuple[str, ...]:
    """The weights, and the files beside them that are no weights. Links are followed: a download's files are links."""
    weights = set(base.files.values()) | ({INDEX} if (base.folder / INDEX).is_file() else set())
    others = {
        path.name
        for path in base.folder.iterdir()
        if path.is_file() and not path.name.startswith(".") and not path.name.lower().endswith(_LEFT_OUT)
    }
    for name in sorted(weights | others - {_CARD}):
        shutil.copyfile(base.folder / name, folder / name)
    if (base.folder / _TEMPLATES).is_dir():
        shutil.copytree(base.folder / _TEMPLATES, folder / _TEMPLATES)
    return tuple(sorted(weights | others - {_CARD}))


def _bring_texts(source: Source, folder: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The adapter's chat template and tokenizer take the base's place, as they do when it is served."""
    brought = []
    for file in TEXT_FILES:
        if file is not PROFILE and (source.folder / file.name).is_file():
            shutil.copyfile(source.folder / file.name, folder / file.name)
            brought.append(file.name)
    has_profile = (source.folder / PROFILE.name).is_file()
    notes = (f"{PROFILE.name} is an adapter's, and a base has none: left out",) if has_profile else ()
    return tuple(brought), notes
