"""The attention hook: transformers calls it in every attention layer, it stores and reads the paged cache.

A packed batch has batch dimension 1 and all sequences' new tokens side by side. The model passes no mask (none is made
for an implementation that registers none): causality, windows and sequence borders are `paged_attention`'s work. What
the step needs travels through the model's keyword arguments as `paged`.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from loraplex.errors import UnsupportedModel
from loraplex.ops import AttentionMetadata, LayerAttention, Ops

ATTENTION_NAME = "loraplex_paged"


@dataclass(slots=True)
class LayerCache:
    """One layer's part of the paged cache: k [num_blocks, block_size, Hkv, D], v [..., Dv], and its attention."""

    k: Tensor
    v: Tensor
    attention: LayerAttention


@dataclass(frozen=True, slots=True)
class LayerGeometry:
    """What a layer asked of the cache when it was first called."""

    num_kv_heads: int
    key_dim: int
    value_dim: int
    attention: LayerAttention

    @property
    def num_values(self) -> int:
        """Numbers stored for one token."""
        return self.num_kv_heads * (self.key_dim + self.value_dim)


class KVCache:
    """The paged cache of all layers."""

    def __init__(
        self,
        geometry: dict[int, LayerGeometry],
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.layers: dict[int, LayerCache] = {}
        for index, layer in geometry.items():
            shape = (num_blocks, block_size, layer.num_kv_heads)
            self.layers[index] = LayerCache(
                torch.zeros(*shape, layer.key_dim, dtype=dtype, device=device),
                torch.zeros(*shape, layer.value_dim, dtype=dtype, device=device),
                layer.attention,
            )

    @property
    def nbytes(self) -> int:
        return sum(layer.k.nbytes + layer.v.nbytes for layer in self.layers.values())


@dataclass(slots=True)
class PagedStep:
    """The `paged` argument of a forward pass. `called` collects the layers whose hook ran (for the load proof)."""

    ops: Ops
    cache: KVCache
    attn: AttentionMetadata
    called: set[int] = field(default_factory=set)

    def attend(self, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, Hq, D], k and v [T, Hkv, D or Dv] -> [T, Hq, Dv]. Rows past the last sequence are padding: 0 out."""
        layer = self.cache.layers[index]
        self.called.add(index)
        num_tokens = self.attn.slot_mapping.shape[0]
        padding = q.shape[0] - num_tokens
        if padding:
            q, k, v = q[:num_tokens], k[:num_tokens], v[:num_tokens]
        self.ops.store_kv(k, v, layer.k, layer.v, self.attn.slot_mapping)
        output = self.ops.paged_attention(q, layer.k, layer.v, self.attn, layer.attention)
        return nn.functional.pad(output, (0, 0, 0, 0, 0, padding)) if padding else output


@dataclass(slots=True)
class GeometryProbe:
    """A `paged` argument that only looks: it records every layer's shapes and answers zeros."""

    layers: dict[int, LayerGeometry] = field(default_factory=dict)

    def record(self, index: int, k: Tensor, v: Tensor, attention: LayerAttention) -> None:
        self.layers[index] = LayerGeometry(k.shape[1], k.shape[2], v.shape[2], attention)


def paged_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    paged: PagedStep | GeometryProbe | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """query [1, Hq, T, D], key [1, Hkv, T, D], value [1, Hkv, T, Dv] -> [1, T, Hq, Dv], as transformers expects.

    Source of the convention: transformers' AttentionInterface (`sdpa_attention_forward` has the same signature).
    """
    if paged is None:
        raise UnsupportedModel(
            f"{type(module).__name__} was called without the step's metadata: the model does not hand keyword "
            "arguments down to its attention, so its keys and values cannot be paged."
        )
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # [T, H, D]
    index: int = module.layer_idx  # type: ignore[assignment]
    if isinstance(paged, GeometryProbe):
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        sinks = None if s_aux is None else s_aux.detach().float()
        paged.record(index, k, v, LayerAttention(scale, sliding_window, softcap, sinks))
        return query.new_zeros(1, q.shape[0], q.shape[1], v.shape[2]), None
    return paged.attend(index, q, k, v).unsqueeze(0), None


def register_attention() -> str:
    """Make the hook known to transformers; returns the name to give as `attn_implementation`."""
    AttentionInterface.register(ATTENTION_NAME, paged_attention_forward)
    return ATTENTION_NAME
