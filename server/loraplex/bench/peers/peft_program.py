"""A program: transformers with PEFT's mixed batches, `generate(adapter_names=[...])`, asked over its standard input.

    python peft_program.py BASE THREADS ADAPTER...

One JSON object a line in, one out: {"measure": {...}} runs a cell in static batches of `clients`, {"first_tokens":
{...}} gives texts. PEFT is a library: there is no HTTP, no queue, and a batch begins and ends together.

It is given its best: adapters stay in bfloat16, and the weights keep requires_grad. (Without, torch copies the output
head's matrix for each row of a batch; PEFT freezes weights, so that is what a user has who does not know.)
"""

import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer


class Clock(BaseStreamer):
    """When each step's tokens came. The first thing that `generate` puts is the prompt."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class MixedBatches:
    def __init__(self, base: Path, adapters: list[Path]):
        self._tokenizer = AutoTokenizer.from_pretrained(base)
        self._base = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval()
        self._base.generation_config.eos_token_id = None  # every answer has its full length
        self._adapters = adapters
        self._model: PeftModel | None = None

    def answer(self, request: dict) -> object:
        if "measure" in request:
            return self.measure(**request["measure"])
        return self.first_tokens(**request["first_tokens"])

    def measure(self, prompts: list[list[int]], names: list[str], clients: int, output_tokens: int) -> dict:
        """Request i asks for names[i % len]; no names: the base. Times in milliseconds."""
        self._generate(prompts[:clients], self._names_of(names, 0, min(clients, len(prompts))), 2)  # warm up
        waits, per_token = [], []
        started = time.perf_counter()
        for start in range(0, len(prompts), clients):
            batch = prompts[start : start + clients]
            begun = time.perf_counter()
            times = self._generate(batch, self._names_of(names, start, len(batch)), output_tokens)[1]
            waits += [1e3 * (times[0] - begun)] * len(batch)
            per_token += [1e3 * (times[-1] - times[0]) / max(1, output_tokens - 1)] * len(batch)
        seconds = time.perf_counter() - started
        return {
            "tokens_per_second": len(prompts) * output_tokens / seconds,
            "ttft_p50": median(waits),
            "ttft_max": max(waits),
            "per_token_p50": median(per_token),
        }

    def first_tokens(self, prompts: list[list[int]], names: list[str | None]) -> list[str]:
        """For each name (None: the base), and each prompt of it."""
        texts = []
        for name in names:
            for prompt in prompts:
                output = self._generate([prompt], [] if name is None else [name], 1)[0]
                texts.append(self._tokenizer.decode(output[0, -1:]))
        return texts

    @staticmethod
    def _names_of(names: list[str], start: int, count: int) -> list[str]:
        return [names[index % len(names)] for index in range(start, start + count)] if names else []

    def _generate(self, prompts: list[list[int]], names: list[str], tokens: int) -> tuple[torch.Tensor, list[float]]:
        """Greedy; the ids [batch, prompt + tokens], and when each token came. Without names: the base."""
        if not names and self._model is not None:
            names = ["__base__"] * len(prompts)
        ids = torch.tensor(prompts)
        clock = Clock()
        mixed = {"adapter_names": names} if names else {}
        output = self._model_for(names).generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            streamer=clock,
            **mixed,
        )
        return output, clock.times[1:]

    def _model_for(self, names: list[str]) -> Any:
        """Adapters are put into the base when one is first asked for: what is asked of the base before that is
        transformers alone."""
        if not names:
            return self._base
        if self._model is None:
            first, *others = self._adapters
            self._model = PeftModel.from_pretrained(
                self._base, first, adapter_name=first.name, is_trainable=True, autocast_adapter_dtype=False
            )
            for path in others:
                self._model.load_adapter(path, adapter_name=path.name, is_trainable=True, autocast_adapter_dtype=False)
            self._model.eval().requires_grad_(True)
        return self._model


def main() -> None:
    torch.set_num_threads(int(sys.argv[2]))
    peer = MixedBatches(Path(sys.argv[1]), [Path(text) for text in sys.argv[3:]])
    sys.stdout.write("{}\n")  # ready
    sys.stdout.flush()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(peer.answer(json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
