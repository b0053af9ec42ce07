"""Preparation: random adapters pushed to a loraplex server, so that there are as many as a workload asks for."""

import asyncio
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from loraplex.bench.random_model import save_random_adapter
from loraplex.bench.roofline import ModelCost
from loraplex.bench.server import BenchFailed, ServerFacts, ServerUnderTest
from loraplex.lora.weights import ModuleShape
from loraplex.model.loader import measure_geometry, read_config
from loraplex.model.targets import linear_targets


@dataclass(frozen=True, slots=True)
class BaseShape:
    """A base without its weights: on torch's meta device."""

    model: nn.Module
    targets: dict[str, ModuleShape]
    dtype: torch.dtype

    @classmethod
    def read(cls, folder: Path) -> "BaseShape":
        """Raises StartupError (UnsupportedModel) for a folder that cannot be served."""
        config = read_config(folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        return cls(model, linear_targets(model), model.dtype)

    def cost(self, dtype: torch.dtype) -> ModelCost:
        """Of serving it in `dtype`. Raises UnsupportedModel for a mixture of experts."""
        return ModelCost.of(self.model, self.targets, measure_geometry(self.model), dtype)


class Preparation:
    def __init__(self, server: ServerUnderTest, facts: ServerFacts, base: BaseShape, rank: int):
        self._server = server
        self._base = base
        self._rank = rank
        if not facts.is_loraplex:
            raise BenchFailed(f"{server.url} is no loraplex server: adapters cannot be pushed to it. Leave --prepare.")

    async def push(self, names: Sequence[str], on_each: Callable[[], object] = lambda: None) -> int:
        """Make sure that every name is served with the rank; returns how many were pushed. The adapter of names[i] is
        drawn from seed i, so a second preparation finds the first one's."""
        found = await self._server.adapters()
        pushed = 0
        folder = Path(tempfile.mkdtemp(prefix="loraplex-bench-"))
        try:
            for seed, name in enumerate(names):
                there = found.get(name)
                if there is None or there.rank != self._rank:
                    shapes = self._base.targets.values()
                    await asyncio.to_thread(
                        save_random_adapter, shapes, self._rank, seed, self._base.dtype, folder / "adapter"
                    )
                    await self._server.push(name, folder / "adapter")
                    pushed += 1
                on_each()
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return pushed
