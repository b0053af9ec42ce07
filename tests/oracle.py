"""The slow, obviously right implementation: one request at a time, dense, unpaged, no batching, no cache.

It runs transformers' own forward pass over the whole sequence and adds every adapter by the textbook formula,
y = Wx + b + scale · scaling · B(Ax), with forward hooks on the untouched modules.
"""

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loraplex.lora.weights import LoRAWeights, ModuleShape


class Oracle:
    def __init__(self, model: PreTrainedModel, targets: dict[str, ModuleShape]):
        self.model = model
        self.targets = targets

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int], adapters: Sequence[tuple[LoRAWeights, float]] = ()) -> Tensor:
        """Logits float32 [len(token_ids), V] of one sequence under `adapters` [(weights, scale)]."""
        with ExitStack() as stack:
            for weights, scale in adapters:
                for name in weights.modules:
                    hook = self._delta_hook(weights, name, scale)
                    stack.callback(self.model.get_submodule(name).register_forward_hook(hook).remove)
            output = self.model(torch.tensor([list(token_ids)]), use_cache=False)
        return output.logits[0].float()

    def _delta_hook(self, weights: LoRAWeights, name: str, scale: float):
        shape, delta = self.targets[name], weights.modules[name]
        extra = weights.extra(shape)
        gain, shift = (None, None) if extra is None else (extra.gain, extra.shift)
        a, b = weights.a(shape).float(), weights.bt(shape).float().T

        def hook(module, inputs, output):
            if gain is not None:
                bias = 0 if module.bias is None else module.bias
                output = bias + gain * (output - bias)
            if shift is not None:
                output = output + shift
            shrunk = a[inputs[0]] if shape.kind == "embedding" else inputs[0].float() @ a.T
            return output + (scale * delta.scaling * shrunk @ b.T).to(output.dtype)

        return hook

    def greedy(
        self, prompt: Sequence[int], num_tokens: int, adapters: Sequence[tuple[LoRAWeights, float]] = ()
    ) -> list[int]:
        tokens = list(prompt)
        for _ in range(num_tokens):
            tokens.append(int(self.logits(tokens, adapters)[-1].argmax()))
        return tokens[len(prompt) :]
