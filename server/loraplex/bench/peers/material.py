"""Material: what every peer serves. A random base with a tokenizer, and random adapters, the same at every making."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loraplex.bench.preparation import BaseShape
from loraplex.bench.random_model import VOCAB_SIZE, save_random_adapter, save_random_base

BASE_NAME = "base"
_NAME = "bench-{:04d}"
_NUM_BYTE_TOKENS = 257  # the end token and one for each byte: not whole characters


@dataclass(frozen=True, slots=True)
class Material:
    """`base`: a transformers folder. `adapters`: the PEFT folder by name, in order; all in `adapters_folder`.
    `changes`: to the config of `random_llama`."""

    folder: Path
    num_adapters: int
    rank: int
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def base(self) -> Path:
        return self.folder / BASE_NAME

    @property
    def adapters_folder(self) -> Path:
        return self.folder / f"adapters-rank-{self.rank}"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(_NAME.format(index) for index in range(self.num_adapters))

    @property
    def adapters(self) -> dict[str, Path]:
        return {name: self.adapters_folder / name for name in self.names}

    @property
    def token_pool(self) -> list[int]:
        """Ids whose text is a word of its own."""
        return list(range(_NUM_BYTE_TOKENS, int(self.changes.get("vocab_size", VOCAB_SIZE))))

    @property
    def stamp(self) -> Path:
        """Written last: what the files were made of."""
        return self.folder / "material.json"

    def fixed_prompts(self, count: int, num_tokens: int) -> list[list[int]]:
        """The same for every peer and run."""
        return np.random.default_rng(0).choice(self.token_pool, (count, num_tokens)).tolist()

    def make(self) -> None:
        """Write what is not there. Files of an earlier run are taken when they were made of the same settings."""
        settings = json.dumps({"rank": self.rank, **self.changes}, sort_keys=True)
        stamp = self.stamp
        is_same = stamp.is_file() and stamp.read_text(encoding="utf-8") == settings
        if not is_same:
            stamp.unlink(missing_ok=True)
            save_random_base(self.base, **self.changes)
        targets = BaseShape.read(self.base).targets.values()
        for seed, path in enumerate(self.adapters.values()):
            if not (is_same and (path / "adapter_model.safetensors").is_file()):
                save_random_adapter(targets, self.rank, seed, torch.bfloat16, path)
        if not is_same:
            stamp.write_text(settings, encoding="utf-8")
