"""ModelCost: the bytes and the arithmetic that a step of a model needs, whatever computes it.

    bytes  = linears + output head + batch · context · KV + the adapters of the step      each read once
    FLOPs  = 2 · linears · tokens + 2 · head · rows with logits + attention + 2 · adapters · tokens
    time  >= max(bytes / bandwidth, FLOPs / FLOP rate)                                    the roofline

Activations are left out: they are small and stay in the caches. Source of the model: Williams et al., "Roofline: an
insightful visual performance model", CACM 2009.
"""

from dataclasses import dataclass

import torch
from torch import nn

from loraplex.errors import UnsupportedModel
from loraplex.lora.weights import ModuleShape, slab_numel
from loraplex.model.attention import LayerGeometry
from loraplex.model.experts import expert_parameters


@dataclass(frozen=True, slots=True)
class StepCost:
    """Bytes read and floating-point operations of one step."""

    nbytes: float
    flops: float

    def seconds(self, bandwidth: float, flop_rate: float) -> float:
        """The least time on a machine of these limits (bytes a second, FLOP a second)."""
        return max(self.nbytes / bandwidth, self.flops / flop_rate)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCost:
    """linear_numel, head_numel    weights that every token, and every row with logits, is multiplied with
    value_bytes                    of one weight, key or value
    kv_numel                       keys and values that a token leaves in the cache
    attention_flops                of one query against one position, over all layers and heads
    rank_numel                     weights of an adapter of rank 1 on all linears
    """

    linear_numel: int
    head_numel: int
    value_bytes: int
    kv_numel: int
    attention_flops: int
    rank_numel: int

    @classmethod
    def of(
        cls,
        model: nn.Module,
        targets: dict[str, ModuleShape],
        geometry: dict[int, LayerGeometry],
        dtype: torch.dtype,
    ) -> "ModelCost":
        """Raises UnsupportedModel for a mixture of experts: which of them a step reads depends on the tokens."""
        if any(expert_parameters(module) for module in model.modules()):
            raise UnsupportedModel("The limits of a mixture of experts are not computed: they depend on the tokens.")
        linears = [shape for shape in targets.values() if shape.kind == "linear"]
        heads = [shape for shape in targets.values() if shape.kind == "head"]
        config = model.config.get_text_config()  # type: ignore[operator]
        num_heads = getattr(config, "num_attention_heads", 0)
        layers = geometry.values()
        return cls(
            linear_numel=sum(shape.in_features * shape.out_features for shape in linears),
            head_numel=sum(shape.in_features * shape.out_features for shape in heads),
            value_bytes=dtype.itemsize,
            kv_numel=sum(layer.num_kv_heads * (layer.key_dim + layer.value_dim) for layer in layers),
            attention_flops=sum(2 * num_heads * (layer.key_dim + layer.value_dim) for layer in layers),
            rank_numel=slab_numel((shape, 1) for shape in linears),
        )

    @property
    def weight_bytes(self) -> int:
        return (self.linear_numel + self.head_numel) * self.value_bytes

    def adapter_numel(self, rank: float) -> float:
        """Weights of an adapter of `rank` on all linears."""
        return self.rank_numel * rank

    def decode(self, batch: float, context: float, num_adapters: float = 0, adapter_numel: float = 0) -> StepCost:
        """A step of `batch` sequences, one token each, over `context` tokens; `num_adapters` distinct ones of
        `adapter_numel` weights."""
        nbytes = self.weight_bytes + batch * context * self.kv_numel * self.value_bytes
        flops = batch * (2 * (self.linear_numel + self.head_numel) + context * self.attention_flops)
        return self._with_adapters(nbytes, flops, batch, num_adapters, adapter_numel)

    def prefill(self, sequences: float, length: float, num_adapters: float = 0, adapter_numel: float = 0) -> StepCost:
        """A step over `sequences` whole prompts of `length` tokens, with the logits of the last position of each."""
        tokens = sequences * length
        nbytes = self.weight_bytes + tokens * self.kv_numel * self.value_bytes
        flops = (
            2 * tokens * self.linear_numel
            + 2 * sequences * self.head_numel
            + tokens * (length + 1) / 2 * self.attention_flops
        )
        return self._with_adapters(nbytes, flops, tokens, num_adapters, adapter_numel)

    def _with_adapters(
        self, nbytes: float, flops: float, tokens: float, num_adapters: float, adapter_numel: float
    ) -> StepCost:
        adapted = tokens if num_adapters else 0
        return StepCost(nbytes + num_adapters * adapter_numel * self.value_bytes, flops + 2 * adapted * adapter_numel)
