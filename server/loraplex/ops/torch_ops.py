"""The operations in plain torch: specification and oracle for the kernels, and the way for devices without any.

Every function is its equation, one sequence or one segment at a time, in float32, rounded once where it writes.
Works on every device and dtype; not row-invariant (a matrix product may sum in another order for another M).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from loraplex.ops import AttentionMetadata, LayerAttention, LoRASegments, ModulePool
from loraplex.ops.noise import gumbel_noise


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """k_cache[slot_mapping[t]] = k[t], v_cache[slot_mapping[t]] = v[t], both in place.

    k [T, Hkv, D], v [T, Hkv, Dv]; caches [num_blocks, block_size, Hkv, D or Dv]; slot_mapping int64 [T], its
    values distinct.
    """
    k_cache.flatten(0, 1)[slot_mapping] = k
    v_cache.flatten(0, 1)[slot_mapping] = v


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, attn: AttentionMetadata, layer: LayerAttention
) -> Tensor:
    """softmax(cap(scale · q·kᵀ)) · v over the keys each token may see: q [T, Hq, D] -> new [T, Hq, Dv], q's dtype.

    Token t of sequence i stands at p = seq_lens[i] - (cu_seqlens_q[i + 1] - t) and sees p - window < j <= p.
    cap(x) = softcap · tanh(x / softcap). A sink adds exp(sink[h]) to the denominator and nothing to the numerator.
    """
    cu = attn.cu_seqlens_q.tolist()
    outputs = []
    for i, length in enumerate(attn.seq_lens.tolist()):
        num_blocks = -(-length // attn.block_size)
        blocks = attn.block_tables[i, :num_blocks].long()
        k = k_cache[blocks].flatten(0, 1)[:length].float()  # [length, Hkv, D]
        v = v_cache[blocks].flatten(0, 1)[:length].float()  # [length, Hkv, Dv]
        q_i = q[cu[i] : cu[i + 1]].float()  # [n, Hq, D]
        position = torch.arange(length - len(q_i), length, device=q.device)
        outputs.append(_attend(q_i, k, v, position, layer).to(q.dtype))
    if not outputs:
        return q.new_empty(0, q.shape[1], v_cache.shape[-1])
    return torch.cat(outputs)


def _attend(q: Tensor, k: Tensor, v: Tensor, position: Tensor, layer: LayerAttention) -> Tensor:
    """One sequence in float32: q [n, Hq, D] at `position` [n], k [length, Hkv, D], v [length, Hkv, Dv]
    -> [n, Hq, Dv]."""
    num_heads, group = q.shape[1], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    logits = layer.scale * torch.einsum("nhd,jhd->hnj", q, k)
    if layer.softcap is not None:
        logits = layer.softcap * torch.tanh(logits / layer.softcap)
    key_position = torch.arange(k.shape[0], device=q.device)
    visible = key_position <= position[:, None]
    if layer.window is not None:
        visible &= key_position > position[:, None] - layer.window
    logits = logits.masked_fill(~visible, float("-inf"))
    if layer.sinks is not None:
        sink = layer.sinks.float().view(num_heads, 1, 1).expand(-1, q.shape[0], 1)
        logits = torch.cat([logits, sink], dim=-1)
    probability = logits.softmax(dim=-1)[..., : k.shape[0]]
    return torch.einsum("hnj,jhv->nhv", probability, v)


def shrink(x: Tensor, pool: ModulePool, lora: LoRASegments) -> Tensor:
    """s[offset_i + t, :rank] = x[start_i + t] @ Aᵀ for every segment i: x [T, in] -> new float32
    [num_rows, max_rank]; columns past the adapter's rank are undefined (here 0)."""
    s = torch.zeros(lora.num_rows, lora.max_rank, dtype=torch.float32, device=x.device)
    for start, end, place, _, offset in _segments(lora):
        a = _matrix(pool, place, pool.offset_a, pool.in_features)
        s[offset : offset + end - start, : len(a)] = x[start:end].float() @ a.float().T
    return s


def expand(y: Tensor, s: Tensor, pool: ModulePool, lora: LoRASegments) -> None:
    """y[start_i + t] += scale_i · scaling · s[offset_i + t, :rank] @ Bᵀ for every segment i in order, in place.

    y [T, out], any row stride; s float32 [num_rows, max_rank]. Summed in float32, rounded once per segment; a
    segment of rank 0 leaves y untouched.
    """
    for start, end, place, scale, offset in _segments(lora):
        bt = _matrix(pool, place, pool.offset_b, pool.out_features)
        if len(bt) == 0:
            continue
        weighted = s[offset : offset + end - start, : len(bt)] * (pool.scaling[place] * scale)
        y[start:end] = (y[start:end].float() + weighted @ bt.float()).to(y.dtype)


def add_lora(y: Tensor, x: Tensor, pool: ModulePool, lora: LoRASegments) -> None:
    """y[s:e] += scale · (x[s:e] @ Aᵀ) @ Bᵀ for every segment, in place: expand of shrink."""
    expand(y, shrink(x, pool, lora), pool, lora)


def draw(logits: Tensor, keys: Sequence[int]) -> Tensor:
    """argmax over v of logits[r, v] + Gumbel noise of (keys[r], v): logits float32 [R, V] -> int64 [R]."""
    token_ids = torch.arange(logits.shape[1], device=logits.device)
    return (logits + gumbel_noise(keys, token_ids)).argmax(-1)


def _segments(lora: LoRASegments) -> list[tuple[int, int, int, float, int]]:
    """(start, end, place, scale, offset) of every segment, in order."""
    columns = (lora.start, lora.end, lora.place, lora.scale, lora.offset)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def _matrix(pool: ModulePool, place: int, offset: Tensor, columns: int) -> Tensor:
    """[rank, columns] of the adapter in `place`, at its `offset` in its slab, a view; rank 0 gives an empty one. A pool
    that serves one half alone has no other half to look at."""
    rank, slab = int(pool.rank[place]), pool.slabs[place]
    if rank == 0 or slab is None:
        return pool.scaling.new_empty(0, columns)
    start = int(offset[place])
    return slab[start : start + rank * columns].view(rank, columns)
