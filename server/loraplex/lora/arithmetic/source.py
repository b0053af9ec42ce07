"""Source: an adapter to reckon with, checked as for serving.

With the base's Checkpoint the check is the server's. Without one the modules are taken to be what the file says: that
suffices for plain LoRA on linears and embeddings, and whatever else is in the file is refused.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loraplex.errors import AdapterInvalid
from loraplex.lora.arithmetic.checkpoint import Checkpoint
from loraplex.lora.arithmetic.factors import Factors
from loraplex.lora.assemble import Assembly, TensorOf
from loraplex.lora.digest import CONFIG_NAME, WEIGHTS_NAME
from loraplex.lora.files import REQUIRED, TEXT_FILES
from loraplex.lora.headers import read_header, refuse_pickle_name
from loraplex.lora.keys import read_keys
from loraplex.lora.module_plan import ModulePlan
from loraplex.lora.peft import MAX_RANK, PeftConfig
from loraplex.lora.plan import AdapterPlan
from loraplex.lora.reader import AdapterReader, Checked
from loraplex.lora.tensors import FileTensors
from loraplex.lora.text import shown
from loraplex.lora.weights import ModuleShape

_EXPERT = re.compile(r"\.experts\.\d+\.")
_NUMBERS = re.compile(r"(\d+)")


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """`folder` as the user named it. `document`: adapter_config.json as it is. `targets`: the modules of the base, or
    those of the file where no base was given (`has_base`)."""

    folder: Path
    document: Mapping[str, Any]
    checked: Checked
    tensors: FileTensors
    tensor_of: TensorOf
    targets: Mapping[str, ModuleShape]
    has_base: bool

    @property
    def config(self) -> PeftConfig:
        return self.checked.config

    @property
    def plan(self) -> AdapterPlan:
        return self.checked.plan

    @property
    def modules(self) -> Mapping[str, ModulePlan]:
        """Those with a LoRA, in the base's order."""
        return {name: module for name, module in self.plan.modules.items() if module.rank}

    def matrices(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A [rank, in] and B [out, rank] of a module, without its scaling; of experts stacks of them. float32."""
        a, b = Assembly(self.plan, self.tensors, self.tensor_of).matrices(self.plan.modules[name])
        return a.float(), b.float()

    def factors(self, name: str) -> Factors:
        """The delta of a module, its scaling in b; float32."""
        a, b = self.matrices(name)
        return Factors(a, self.plan.modules[name].scaling * b)

    @property
    def beyond_deltas(self) -> str:
        """What the adapter has besides deltas, in words; empty: nothing."""
        keys = [part for module in self.plan.modules.values() for part in module.keys]
        has = {
            "DoRA's magnitudes": "magnitude" in keys,
            "lora_bias": "bias" in keys,
            "trained biases": any(module.trained_bias for module in self.plan.modules.values()),
            "saved modules or token rows": bool(self.plan.replaced),
        }
        return ", ".join(name for name, is_there in has.items() if is_there)


@contextmanager
def opened(folder: Path, base: Checkpoint | None = None) -> Iterator[Source]:
    """The adapter in `folder`. Raises AdapterInvalid and PickleRefused as an upload of it would."""
    _check_folder(folder)
    with tempfile.TemporaryDirectory(prefix="loraplex-") as scratch:
        try:
            source = _read(folder, _without_links(folder, Path(scratch)), base)
        except OSError as cause:
            raise AdapterInvalid(
                f"{folder} cannot be read: {cause.strerror or cause}. Name a folder whose files you may read."
            ) from cause
        yield source


def _read(folder: Path, plain: Path, base: Checkpoint | None) -> Source:
    """`plain`: where the files of `folder` are no links."""
    targets = base.targets if base is not None else _implied_targets(plain)
    tensor_of = base.tensor_of if base is not None else _no_base
    checked = AdapterReader(plain.parent, targets, torch.float32, MAX_RANK, tensor_of).check(plain)
    path = plain / WEIGHTS_NAME
    tensors = FileTensors(read_header(path), memoryview(bytearray(path.read_bytes())))
    document = json.loads((plain / CONFIG_NAME).read_bytes().decode("utf-8-sig"))
    return Source(folder, document, checked, tensors, tensor_of, targets, base is not None)


def _check_folder(folder: Path) -> None:
    for file in REQUIRED:
        if not (folder / file.name).is_file():
            for other in sorted(folder.glob("adapter_model.*")) if folder.is_dir() else ():
                refuse_pickle_name(other.name)
            raise AdapterInvalid(
                f"{folder / file.name} does not exist. Name a folder that PEFT's save_pretrained wrote."
            )


def _without_links(folder: Path, scratch: Path) -> Path:
    """`folder`, or a copy where its files are links (a download's are), which the reader refuses in an upload."""
    names = [file.name for file in (*REQUIRED, *TEXT_FILES) if (folder / file.name).is_file()]
    if not any((folder / name).is_symlink() for name in names):
        return folder
    copy = scratch / "adapter"
    copy.mkdir()
    for name in names:
        shutil.copyfile(folder / name, copy / name)
    return copy


def _implied_targets(folder: Path) -> dict[str, ModuleShape]:
    """The modules that the file has a LoRA for, in their order by name and number."""
    header = read_header(folder / WEIGHTS_NAME)
    config = PeftConfig.from_bytes((folder / CONFIG_NAME).read_bytes())
    try:
        keys = read_keys(header, {}).lora
    except AdapterInvalid as cause:
        raise AdapterInvalid(f"{cause.message} {_NEEDS_BASE}", param=cause.param) from None
    if config.target_parameters or any(_EXPERT.search(name) for name in keys):
        raise AdapterInvalid(f"The adapter {shown(folder.name)} has LoRA on experts or parameters. {_NEEDS_BASE}")
    targets = {}
    for name, parts in sorted(keys.items(), key=lambda item: _by_number(item[0])):
        is_embedding = "embedding A" in parts
        a, b = (parts.get(f"embedding {part}" if is_embedding else part) for part in "AB")
        if a is not None and b is not None:  # the reader says what is amiss elsewhere
            sizes = (header.tensors[a].shape[-1], header.tensors[b].shape[0])
            targets[name] = ModuleShape(name, *sizes, "embedding" if is_embedding else "linear")
    return targets


def _by_number(name: str) -> list[tuple[int, str]]:
    """layers.2 before layers.10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in _NUMBERS.split(name)]


_NEEDS_BASE = "(Without a base only plain LoRA on linears and embeddings is understood: name it with --base MODEL.)"


def _no_base(path: str) -> torch.Tensor:
    raise AdapterInvalid(f"The adapter is to be compared with the base's {shown(path, 160)}. {_NEEDS_BASE}")
