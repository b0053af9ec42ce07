"""GenerateBench: transformers' own `generate`, and PEFT's mixed batches, on the work of `bench step`.

The same random Llama, as many sequences with as long a context, in this process, greedy. A library's batch begins and
ends together; the time of one token is what the tokens after the first take. PEFT is given its best: its adapters stay
in the base's type. Imports without PEFT; where that is missing, its rows say so.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from loraplex.bench.random_model import random_llama
from loraplex.model.devices import choose_device, choose_dtype, set_threads

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateSettings:
    """`adapters`: distinct ones in the largest batch of PEFT's; a smaller batch has one each."""

    batches: tuple[int, ...] = (1, 32)
    adapters: int = 32
    rank: int = 16
    context: int = 1024
    tokens: int = 32
    rounds: int = 3
    dtype: str = "auto"
    device: str = "auto"
    threads: int = 1
    shape: Mapping[str, Any] = field(default_factory=dict)


class GenerateBench:
    def __init__(self, settings: GenerateSettings, show: Callable[[str], object] = lambda _: None):
        self._settings = settings
        self._show = show
        self._device = choose_device(settings.device)
        dtype = choose_dtype(settings.dtype, self._device)
        set_threads(settings.threads, self._device)
        room = settings.context + settings.tokens + 1
        shape = {"max_position_embeddings": max(2048, room), **settings.shape}
        self._model = random_llama(dtype, self._device, **shape).eval()
        generation = self._model.generation_config
        assert generation is not None
        generation.eos_token_id = None  # every answer has its full length
        generation.pad_token_id = 0

    def run(self) -> list[dict[str, Any]]:
        """Rows {"library", "batch", "adapters", "ms", "tokens_per_second", "note"}."""
        settings = self._settings
        rows = []
        for batch in settings.batches:
            self._show(f"transformers generate, batch {batch}")
            rows.append(self._row("transformers", self._model, batch, None))
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError:
            missing = {"library": "PEFT mixed batch", "ms": None, "tokens_per_second": None, "note": "no PEFT here"}
            return [*rows, *({**missing, "batch": batch, "adapters": None} for batch in settings.batches)]
        config = LoraConfig(
            r=settings.rank, lora_alpha=2 * settings.rank, target_modules=LINEARS, task_type="CAUSAL_LM"
        )
        names = [f"a{number}" for number in range(settings.adapters)]
        model = get_peft_model(self._model, config, adapter_name=names[0], autocast_adapter_dtype=False)
        for name in names[1:]:
            model.add_adapter(name, config, autocast_adapter_dtype=False)
        model.eval()
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.04)
        for batch in settings.batches:
            self._show(f"PEFT mixed batch of {batch}")
            chosen = [names[i % len(names)] for i in range(batch)]
            rows.append(self._row("PEFT mixed batch", model, batch, chosen))
        return rows

    def _row(self, library: str, model: Any, batch: int, names: list[str] | None) -> dict[str, Any]:
        settings = self._settings
        generator = torch.Generator().manual_seed(batch)
        size = (batch, settings.context)
        ids = torch.randint(self._model.config.vocab_size, size, generator=generator).to(self._device)
        mixed = {} if names is None else {"adapter_names": names}
        times = []
        for turn in range(settings.rounds + 1):
            first, whole = (self._seconds(model, ids, count, mixed) for count in (1, settings.tokens))
            if turn:
                times.append((whole - first) / (settings.tokens - 1))
        seconds = statistics.median(times)
        return {
            "library": library,
            "batch": batch,
            "adapters": 0 if names is None else len(set(names)),
            "ms": 1e3 * seconds,
            "tokens_per_second": batch / seconds,
            "note": "",
        }

    @torch.inference_mode()
    def _seconds(self, model: Any, ids: torch.Tensor, count: int, mixed: Mapping[str, Any]) -> float:
        wait = torch.cuda.synchronize if self._device.type == "cuda" else lambda: None
        wait()
        started = time.perf_counter()
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, **mixed
        )
        wait()
        assert out.shape[1] == ids.shape[1] + count
        return time.perf_counter() - started
