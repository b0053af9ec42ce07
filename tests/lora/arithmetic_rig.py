"""Tiny model folders, adapters that PEFT wrote for them, and what models answer."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from variants import TOKENS, Variant, make_base, write_variant

from harness import random_ids
from loraplex.lora.arithmetic.checkpoint import Checkpoint
from loraplex.lora.arithmetic.draft import Draft
from loraplex.lora.arithmetic.source import Source, opened
from loraplex.lora.arithmetic.writer import write_adapter
from loraplex.lora.digest import WEIGHTS_NAME
from loraplex.model.targets import find_targets

TOLERANCE = 1e-4


@dataclass
class Rig:
    """A model, and its folder below `root`."""

    root: Path
    model: PreTrainedModel

    @classmethod
    def make(cls, root: Path, name: str) -> "Rig":
        rig = cls(root, make_base(name))
        rig.model.save_pretrained(rig.folder)
        return rig

    @property
    def folder(self) -> Path:
        return self.root / "base"

    @property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint(self.folder, find_targets(self.model))

    def write(self, name: str, seed: int = 0, **fields: Any) -> Path:
        """An adapter with these LoraConfig fields."""
        write_variant(Variant(name, fields), self.model, self.root / name, seed)
        return self.root / name

    @contextmanager
    def sources(self, *folders: Path, with_base: bool = True) -> Iterator[list[Source]]:
        base = self.checkpoint if with_base else None
        with ExitStack() as stack:
            yield [stack.enter_context(opened(folder, base)) for folder in folders]

    def save(self, draft: Draft, name: str = "out", **options: Any) -> Path:
        """The draft as a folder, read back on this base."""
        folder = self.root / name
        folder.mkdir()
        write_adapter(draft, folder, self.checkpoint, **options)
        return folder

    @torch.inference_mode()
    def answer(self, adapter: Path | None = None) -> Tensor:
        """Logits of the base, or as PEFT has them with the adapter."""
        model: nn.Module = copy.deepcopy(self.model)
        if adapter is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PEFT's own
                model = peft.PeftModel.from_pretrained(model, str(adapter))
        return logits_of(model)


def deltas(folder: Path) -> dict[str, Tensor]:
    """PEFT's scaling · B · A by module, of an adapter of plain linears with one rank and alpha; float64 [out, in]."""
    config = peft.LoraConfig.from_pretrained(str(folder))
    tensors = load_file(folder / WEIGHTS_NAME)
    scale = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    found = {}
    for key, a in tensors.items():
        if key.endswith(".lora_A.weight"):
            b = tensors[key.replace("lora_A", "lora_B")]
            found[key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")] = scale * (
                b.double() @ a.double()
            )
    return found


@torch.inference_mode()
def logits_of(model: nn.Module) -> Tensor:
    ids = random_ids(20, seed=1)
    ids[3 : 3 + len(TOKENS)] = TOKENS
    return model(torch.tensor([ids])).logits[0]


def loaded(folder: Path) -> PreTrainedModel:
    """A model folder as transformers reads it, whole."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)  # type: ignore[misc]
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model


def assert_equal_answers(found: Tensor, expected: Tensor, what: object = "") -> None:
    error = (found - expected).abs().max() / (expected.max() - expected.min())
    assert error <= TOLERANCE, (what, float(error))


def assert_other_answers(found: Tensor, expected: Tensor, what: object = "") -> None:
    """Equality would also hold if nothing had any effect."""
    assert (found - expected).abs().max() > 100 * TOLERANCE * (expected.max() - expected.min()), what
