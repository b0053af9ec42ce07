"""The operations a LoRA server needs beside the base model, behind one protocol.

    store_kv          k_cache[slot_mapping[t]] = k[t]; same for v
    paged_attention   causal attention of each sequence's new tokens over its blocks
    add_lora          y[s:e] += scale · (x[s:e] @ Aᵀ) @ Bᵀ for each segment (s, e, place, scale)
    draw              a token of softmax(logits) for each row, as the argmax of logits + Gumbel noise

`torch_ops` is specification and oracle and runs on every device; `numba_ops` is the CPU implementation, `triton_ops`
CUDA's. `select_ops(device)` chooses once and imports lazily.

Row invariance: what an op gives for a token is bit-equal whatever else is in the batch. The CPU's kernels reduce in an
order fixed by the token's own data alone (its context length, the rank, the feature count); what holds on CUDA, its
modules say.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(slots=True)
class AttentionMetadata:
    """The geometry of one packed batch of B sequences and T new tokens. All tensors live on the device.

    cu_seqlens_q  int32 [B + 1]   tokens cu[i]:cu[i + 1] belong to sequence i
    seq_lens      int32 [B]       tokens of sequence i in the cache after this step, its new ones included
    block_tables  int32 [B, M]    block ids of sequence i in order; entries past its length are unused
    slot_mapping  int64 [T]       block id * block_size + offset: where token t's key and value go

    What the host knows of them, for the size of a launch (bounds suffice; nothing is computed with them):
    max_query_len, min_query_len  new tokens of any sequence, at most and at least (those of none left out)
    max_seq_len                   the largest of seq_lens; None: the tables' width is the bound
    """

    cu_seqlens_q: Tensor
    seq_lens: Tensor
    block_tables: Tensor
    slot_mapping: Tensor
    block_size: int
    max_query_len: int | None = None
    min_query_len: int = 0
    max_seq_len: int | None = None


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """What attention needs to know of its layer. `sinks`: float32 [num_heads], a logit added to the softmax sum."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


@dataclass(slots=True)
class LoRASegments:
    """The segments of one batch. Segments may overlap (compositions); within a row they apply in this order.

    start, end   int32 [S]     rows start[i]:end[i] of x and y
    place        int32 [S]     pool place of the adapter
    scale        float32 [S]   the request's scale, on top of the adapter's own scaling
    offset       int32 [S]     first row of segment i in the shrink's output (= sum of earlier lengths)
    num_rows                   sum of all lengths
    addresses                  where the tensors lie, noted by kernels that take addresses
    max_rank                   largest rank of any adapter in the segments (width of the shrink's output)
    count        int32 [1]     the segments that are live, the first ones; None: all. Only CUDA's kernels know it: where
                               a graph is replayed, the tensors and num_rows, max_rank are capacities
    plan                       how kernels have cut the segments into tiles, noted by them
    """

    start: Tensor
    end: Tensor
    place: Tensor
    scale: Tensor
    offset: Tensor
    num_rows: int
    max_rank: int
    count: Tensor | None = None
    addresses: tuple[int, ...] | None = field(default=None, init=False, repr=False)
    plan: Any = field(default=None, init=False, repr=False)


@dataclass(slots=True)
class ModulePool:
    """One target module's column of the adapter pool; P places.

    slabs      list of P    flat slab of the adapter in that place (see `lora.weights`), None when free
    address    int64 [P]    data pointer of that slab, 0 when free
    rank       int32 [P]    0: the adapter in that place has no delta on this module
    offset_a   int64 [P]    A is slab[offset_a:][: rank * in_features] as [rank, in_features]
    offset_b   int64 [P]    Bᵀ is slab[offset_b:][: rank * out_features] as [rank, out_features]
    scaling    float32 [P]  alpha / r or alpha / sqrt(r)
    table      int64 [P, 4] the same where kernels on a device read it: the addresses of A and Bᵀ, the rank, the
                            scaling's bits (see `module_table`); None: the tensors above are all there is
    is_aligned              every A and Bᵀ in the table starts at a multiple of 16 bytes

    The tensors are views into tables shared by all modules; only the pool's owner writes them, between steps, and never
    puts others in their place: `addresses`, where they lie, is noted by kernels that take addresses.
    """

    in_features: int
    out_features: int
    slabs: list[Tensor | None]
    address: Tensor
    rank: Tensor
    offset_a: Tensor
    offset_b: Tensor
    scaling: Tensor
    table: Tensor | None = None
    is_aligned: bool = False
    addresses: tuple[int, ...] | None = field(default=None, init=False, repr=False)


class ModuleGroup:
    """Modules that read the same input and whose outputs stand side by side in one tensor; their pools have tables.

    members  int64 [G, 3]  of each module: the address of its table, its first column in the outputs, their number
    """

    def __init__(self, pools: Sequence[ModulePool]):
        tables = [pool.table for pool in pools if pool.table is not None]
        assert len(tables) == len(pools) > 0
        self.pools = tuple(pools)
        columns = accumulate((pool.out_features for pool in pools), initial=0)
        rows = [
            (table.data_ptr(), column, pool.out_features)
            for table, column, pool in zip(tables, columns, pools, strict=False)
        ]
        self.members = torch.tensor(rows, dtype=torch.int64, device=tables[0].device)


def module_table(
    address: Tensor, rank: Tensor, offset_a: Tensor, offset_b: Tensor, scaling: Tensor, itemsize: int
) -> Tensor:
    """`ModulePool.table` of a pool's other tensors [P], where they are; `itemsize`: bytes of a number in its slabs."""
    bits = scaling.contiguous().view(torch.int32)
    return torch.stack([address + offset_a * itemsize, address + offset_b * itemsize, rank.long(), bits.long()], dim=1)


class Ops(Protocol):
    """Implemented by modules. Shapes: T tokens, Hq query heads, Hkv key/value heads, D head size."""

    def store_kv(self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
        """Write k [T, Hkv, D] and v [T, Hkv, Dv] into the caches [num_blocks, block_size, Hkv, D or Dv] in place:
        cache.view(-1, Hkv, D)[slot_mapping[t]] = k[t]."""
        ...

    def paged_attention(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, attn: AttentionMetadata, layer: LayerAttention
    ) -> Tensor:
        """Causal attention of q [T, Hq, D] over the blocks of each sequence -> [T, Hq, Dv], dtype of q.

        Token t of sequence i stands at position p = seq_lens[i] - (cu[i + 1] - t) and sees key positions j with
        p - window < j <= p (window None: 0 <= j <= p). logits = scale * q·k, softcap * tanh(logits / softcap) if
        set, softmax over them in float32 with the layer's sink logit added to the denominator if set. Query head h
        reads key/value head h // (Hq // Hkv).
        """
        ...

    def shrink(self, x: Tensor, pool: ModulePool, lora: LoRASegments) -> Tensor:
        """s [num_rows, max_rank] float32: s[offset_i + t, :rank] = x[start_i + t] @ Aᵀ; columns past the rank are
        undefined."""
        ...

    def expand(self, y: Tensor, s: Tensor, pool: ModulePool, lora: LoRASegments) -> None:
        """y[start_i + t] += scale_i * scaling[place_i] * s[offset_i + t, :rank] @ Bᵀ, summed in float32, rounded
        once per segment, in place. y [T, out_features] may be a view with a row stride."""
        ...

    def add_lora(self, y: Tensor, x: Tensor, pool: ModulePool, lora: LoRASegments) -> None:
        """expand(y, shrink(x)): y[s:e] += scale · (x[s:e] @ Aᵀ) @ Bᵀ for every segment, in place."""
        ...

    def draw(self, logits: Tensor, keys: Sequence[int]) -> Tensor:
        """int64 [R]: argmax over v of logits[r, v] + noise of (keys[r], v), see `noise`. logits float32 [R, V]; -inf is
        never drawn. Of equals the first."""
        ...


def select_ops(device: torch.device | str) -> Ops:
    """The fastest implementation for `device` that passes the oracle's tests: numba on a CPU, Triton on CUDA where it
    is installed (torch's CUDA builds for Linux bring it), torch elsewhere."""
    kind = torch.device(device).type
    if kind == "cpu":
        from loraplex.ops import numba_ops

        return numba_ops
    if kind == "cuda" and find_spec("triton") is not None:
        from loraplex.ops import triton_ops

        return triton_ops
    from loraplex.ops import torch_ops

    return torch_ops
