"""The slow, obviously right implementation: one request at a time, dense, unpaged, no batching, no cache.

It runs transformers' own forward pass over the whole sequence and adds every adapter by the textbook formula,
y = Wx + b + scale · scaling · B(Ax), with forward hooks on the untouched modules. Parameters that an adapter brings its
own of, and the experts' W + ΔW, stand in the model meanwhile.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
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
                for name in weights.replaced:
                    self._replace(weights, name, stack)
                for name in weights.modules:
                    if self.targets[name].kind == "experts":
                        stack.enter_context(self._with_parameter(name, self._expert_weights(weights, name, scale)))
                        continue
                    hook = self._delta_hook(weights, name, scale)
                    stack.callback(self.model.get_submodule(name).register_forward_hook(hook).remove)
            output = self.model(torch.tensor([list(token_ids)]), use_cache=False)
        return output.logits[0].float()

    def _replace(self, weights: LoRAWeights, name: str, stack: ExitStack) -> None:
        extra = weights.extra(self.targets[name])
        assert extra is not None
        for parameter, tensor in extra.replaced.items():
            path = f"{name}.{parameter}"
            base = self.model.get_parameter(path)
            own = tensor.T if self.targets[name].transposed else tensor
            if extra.rows is not None:
                own = base.index_copy(0, extra.rows, own.to(base.dtype))
            stack.enter_context(self._with_parameter(path, own.to(base.dtype)))

    def _expert_weights(self, weights: LoRAWeights, name: str, scale: float) -> Tensor:
        shape, base = self.targets[name], self.model.get_parameter(name)
        a, bt = weights.a(shape).float(), weights.bt(shape).float()
        delta = scale * weights.modules[name].scaling * torch.einsum("ero,eri->eoi", bt, a)
        return (base.float() + (delta.mT if shape.transposed else delta)).to(base.dtype)

    @contextmanager
    def _with_parameter(self, path: str, tensor: Tensor) -> Iterator[None]:
        """The model with another parameter in one module; what shared it keeps the old one."""
        name, _, attribute = path.rpartition(".")
        module = self.model.get_submodule(name)
        base = getattr(module, attribute)
        setattr(module, attribute, nn.Parameter(tensor, requires_grad=False))
        try:
            yield
        finally:
            setattr(module, attribute, base)

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
