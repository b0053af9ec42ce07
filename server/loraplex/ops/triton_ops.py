"""The operations on CUDA: thin wrappers that size the grids of the Triton kernels.

float16, bfloat16 and float32; x, y and the slabs share one dtype, k, v and the caches too. What the kernels do not
take (other dtypes, a last dimension that is not contiguous, heads beyond MAX_HEAD_SIZE) is `torch_ops`' business, right
and slow. No function here waits for the device: what decides a launch are shapes, strides and numbers on the host, and
grids cover capacities (see `LoRASegments.count`, `AttentionMetadata.max_seq_len`), so every call can be captured in a
graph.

Why not torch's `varlen_attn`: FlashAttention 2's paged form wants blocks of 256 tokens, and neither takes caps, sinks,
or values of another size than the keys.

Source of the layout of grids and splits: Chen et al. 2023 (Punica), Sheng et al. 2023 (S-LoRA).
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# (a kernel's parameters are what its compiler makes of the arguments)

from collections.abc import Callable, Sequence

import torch
import triton
from torch import Tensor

from loraplex.ops import (
    AttentionMetadata,
    LayerAttention,
    LoRASegments,
    ModuleGroup,
    ModulePool,
    module_table,
    torch_ops,
    triton_attention,
    triton_lora,
    triton_pointwise,
    triton_sampling,
)

READS_TABLES = True
"""Pools need tables on the device (`ModulePool.table`): what is built in their stead at every call is for tests."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HEAD_SIZE = 512
SPLIT_KEYS = 256
"""Keys that one program of decoding reads, unless a sequence of the longest kind would need more than _MAX_SPLITS."""

_MAX_SPLITS = 64
_DRAW_PART = 8192
_SUM_SIZE = 1024


def warm_up(dtype: torch.dtype) -> None:
    """Compile the kernels of LoRA and of drawing for the current CUDA device, so that no request waits for that (or
    load them from Triton's cache). Those of attention compile in the proof at load, with the model's own sizes."""
    if dtype not in DTYPES or not torch.cuda.is_available():
        return
    features = 16 * 8
    for rank in (16, 32, 64):
        slab = torch.zeros(2 * rank * features, dtype=dtype, device="cuda")
        row = [slab.data_ptr(), slab.data_ptr(), rank, 0]
        table = torch.tensor([row], dtype=torch.int64, device="cuda")
        none = table[:, 0]
        pool = ModulePool(features, features, [slab], none, none, none, none, none, table, is_aligned=True)
        for rows in (1, 2 * triton_lora.FEW_ROWS):
            x = torch.zeros(rows, features, dtype=dtype, device="cuda")
            zero = torch.zeros(1, dtype=torch.int32, device="cuda")
            lora = LoRASegments(zero, zero + rows, zero, zero.float(), zero, rows, rank)
            add_lora(x.clone(), x, pool, lora)
            for size in (2, 3):
                add_lora_group(x.repeat(1, size), x, ModuleGroup([pool] * size), lora)
    draw(torch.zeros(1, 2 * _DRAW_PART, device="cuda"), [1])


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """k_cache[slot_mapping[t]] = k[t], v_cache[slot_mapping[t]] = v[t], both in place; any dtype. A negative slot is
    padding.

    k [T, Hkv, D], v [T, Hkv, Dv]; caches [num_blocks, block_size, Hkv, D or Dv]; slot_mapping int64 [T].
    """
    for source, cache in ((k, k_cache), (v, v_cache)):
        if source.stride(2) != 1:
            source = source.contiguous()
        tokens, heads, size = source.shape
        if tokens:
            triton_attention.store_kernel[(tokens,)](
                source, *source.stride()[:2], cache, *cache.stride()[:3], slot_mapping, cache.shape[1], heads, size,
                HEADS=triton.next_power_of_2(heads), SIZE=triton.next_power_of_2(size),
            )  # fmt: skip


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, attn: AttentionMetadata, layer: LayerAttention
) -> Tensor:
    """softmax(cap(scale · q·kᵀ)) · v over the keys each token may see: q [T, Hq, D] -> new [T, Hq, Dv], q's dtype.

    See `Ops.paged_attention`; decode and prefill chunks in one call.
    """
    tokens, num_heads, size = q.shape
    _, block_size, num_kv_heads, value_size = v_cache.shape
    if q.dtype not in DTYPES or k_cache.dtype != q.dtype or q.stride(2) != 1 or max(size, value_size) > MAX_HEAD_SIZE:
        return torch_ops.paged_attention(q, k_cache, v_cache, attn, layer)
    out = q.new_empty(tokens, num_heads, value_size)
    num_seqs, group = attn.seq_lens.shape[0], num_heads // num_kv_heads
    if not tokens:
        return out
    is_wide = q.dtype == torch.float32
    padded, padded_value = (max(16, triton.next_power_of_2(n)) for n in (size, value_size))
    keys = max(16, min(64, (8192 if is_wide else 16384) // max(padded, padded_value)))
    features = {
        "KEYS": keys,
        "SIZE": padded,
        "VALUE_SIZE": padded_value,
        "HAS_WINDOW": layer.window is not None,
        "HAS_CAP": layer.softcap is not None,
        "WIDEN": is_wide,
    }
    caches = (k_cache, *k_cache.stride()[:3], v_cache, *v_cache.stride()[:3])
    paging = (attn.cu_seqlens_q, attn.seq_lens, attn.block_tables, attn.block_tables.stride(0))
    numbers = (layer.window or 0, float(layer.scale), float(layer.softcap or 0.0), size, value_size, block_size)
    sinks = attn.seq_lens if layer.sinks is None else layer.sinks  # not read without
    if attn.max_query_len is None or attn.max_query_len > 1:
        rows = max(16 if is_wide else 64, triton.next_power_of_2(group))
        tile = rows // group
        triton_attention.prefill_kernel[(tokens // tile + num_seqs, num_kv_heads)](
            q, *q.stride()[:2], out, *out.stride()[:2], *caches, *paging, sinks, num_seqs, group, *numbers,
            ROWS=rows, TOKENS=tile, SEQS=64,
            HAS_SINKS=layer.sinks is not None, **features,
        )  # fmt: skip
    if attn.min_query_len > 1:
        return out
    capacity = attn.block_tables.shape[1] * block_size
    split = max(SPLIT_KEYS, triton.next_power_of_2(triton.cdiv(capacity, _MAX_SPLITS)))
    splits = triton.cdiv(min(capacity, attn.max_seq_len or capacity), split)
    totals = torch.empty(num_seqs, num_heads, splits, value_size, dtype=torch.float32, device=q.device)
    mosts, denominators = torch.empty(2, num_seqs, num_heads, splits, dtype=torch.float32, device=q.device)
    triton_attention.decode_kernel[(num_seqs, num_kv_heads, splits)](
        q, *q.stride()[:2], totals, mosts, denominators, splits, *caches, *paging, group, num_heads, *numbers,
        SPLIT=split, ROWS=max(16, triton.next_power_of_2(group)), **features,
    )  # fmt: skip
    triton_attention.combine_kernel[(num_seqs, num_heads)](
        out, *out.stride()[:2], totals, mosts, denominators, splits, attn.cu_seqlens_q, attn.seq_lens, sinks,
        num_heads, layer.window or 0, value_size,
        SPLIT=split, VALUE_SIZE=padded_value, HAS_WINDOW=layer.window is not None, HAS_SINKS=layer.sinks is not None,
    )  # fmt: skip
    return out


def shrink(x: Tensor, pool: ModulePool, lora: LoRASegments) -> Tensor:
    """s[offset_i + t, :rank] = x[start_i + t] @ Aᵀ for every segment i: x [T, in], any row stride -> new float32
    [num_rows, max_rank]; columns past the adapter's rank are undefined."""
    if not _is_known(x):
        return torch_ops.shrink(x, pool, lora)
    partial = _shrink(x, (pool,), None, lora, torch.zeros)[0]  # what is summed must be numbers
    s = partial[0]
    if len(partial) > 1 and s.numel():
        s = torch.empty_like(s)
        triton_lora.sum_kernel[(triton.cdiv(s.numel(), _SUM_SIZE),)](
            partial, s, s.numel(), len(partial), SIZE=_SUM_SIZE
        )
    return s[:, : lora.max_rank]


def expand(y: Tensor, s: Tensor, pool: ModulePool, lora: LoRASegments) -> None:
    """y[start_i + t] += scale_i · scaling · s[offset_i + t, :rank] @ Bᵀ for every segment i in order, in place.

    y [T, out], any row stride; s float32 [num_rows, max_rank]. Summed in float32, rounded once per segment.
    """
    if not _is_known(y) or s.stride(1) != 1:
        return torch_ops.expand(y, s, pool, lora)
    _expand(y, s.unsqueeze(0), (pool,), None, lora)


def add_lora(y: Tensor, x: Tensor, pool: ModulePool, lora: LoRASegments) -> None:
    """y[s:e] += scale · (x[s:e] @ Aᵀ) @ Bᵀ for every segment, in place: expand of shrink, without the parts' sum."""
    if not _is_known(x) or not _is_known(y) or x.dtype != y.dtype:
        return torch_ops.add_lora(y, x, pool, lora)
    _expand(y, _shrink(x, (pool,), None, lora)[0], (pool,), None, lora)


def add_lora_group(y: Tensor, x: Tensor, group: ModuleGroup, lora: LoRASegments) -> None:
    """`add_lora` of several modules that read the same x, in two launches: y [T, Σ out] holds their outputs side by
    side, in the group's order."""
    _expand(y, _shrink(x, group.pools, group.members, lora), group.pools, group.members, lora)


def draw(logits: Tensor, keys: Sequence[int]) -> Tensor:
    """argmax over v of logits[r, v] + Gumbel noise of (keys[r], v): logits float32 [R, V] -> int64 [R].

    Any row stride. The noise is that of `torch_ops` up to the rounding of its logarithms.
    """
    if logits.dtype != torch.float32 or logits.stride(1) != 1 or not len(keys):
        return torch_ops.draw(logits, keys)
    rows, vocabulary = logits.shape
    halves = torch.tensor([[key & 0xFFFFFFFF for key in keys], [key >> 32 for key in keys]], dtype=torch.int64)
    if logits.is_cuda:
        halves = halves.pin_memory().to(logits.device, non_blocking=True)
    parts = triton.cdiv(vocabulary, _DRAW_PART)
    values = torch.empty(rows, parts, dtype=torch.float32, device=logits.device)
    tokens = torch.empty(rows, parts, dtype=torch.int32, device=logits.device)
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    triton_sampling.draw_kernel[(rows, parts)](
        logits, logits.stride(0), halves, rows, vocabulary, values, tokens, parts, PART=_DRAW_PART, SIZE=1024
    )
    triton_sampling.choose_kernel[(rows,)](values, tokens, out, parts, vocabulary, PARTS=triton.next_power_of_2(parts))
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, plus_one: bool) -> Tensor:
    """weight · x / sqrt(mean(x²) + eps) over the last dimension, with (1 + weight) for `plus_one`: x [..., H], weight
    [H] -> new contiguous [..., H] (Zhang and Sennrich 2019; the roundings of transformers' LlamaRMSNorm, or of
    GemmaRMSNorm)."""
    size = x.shape[-1]
    rows = x.reshape(-1, size)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        triton_pointwise.rms_norm_kernel[(len(rows),)](
            rows, rows.stride(0), weight, out, size, float(eps), PLUS_ONE=plus_one, SIZE=triton.next_power_of_2(size)
        )
    return out


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up: [..., N] -> new contiguous [..., N] (Shazeer 2020; torch's roundings)."""
    size = gate.shape[-1]
    a, b = (
        part if part.stride(1) == 1 else part.contiguous() for part in (gate.reshape(-1, size), up.reshape(-1, size))
    )
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if out.numel():
        triton_pointwise.silu_mul_kernel[(len(a), triton.cdiv(size, 1024))](
            a, a.stride(0), b, b.stride(0), out, size, SIZE=1024
        )
    return out


def _is_known(x: Tensor) -> bool:
    return x.dtype in DTYPES and x.stride(1) == 1


def _shrink(
    x: Tensor,
    pools: Sequence[ModulePool],
    members: Tensor | None,
    lora: LoRASegments,
    allocate: Callable[..., Tensor] = torch.empty,
) -> Tensor:
    """float32 [members, splits, num_rows, max_rank or more]: what the parts of the features give. Columns past an
    adapter's rank are as `allocate` left them."""
    pool = pools[0]
    splits = max(1, triton.cdiv(pool.in_features, triton_lora.SPLIT_FEATURES))
    width = triton.cdiv(lora.max_rank, 16) * 16  # so that every launch is of one kind
    shape = (len(pools), splits, lora.num_rows, width)
    partial = allocate(shape, dtype=torch.float32, device=x.device)
    if partial.numel():
        plan, table = triton_lora.plan(lora), _table(pool, x)
        ranks = _rank_block(lora)
        grid = (len(plan.tiles), triton.cdiv(lora.max_rank, ranks), len(pools) * splits)
        triton_lora.shrink_kernel[grid](
            x, x.stride(0), partial, lora.num_rows, width, table, table if members is None else members,
            pool.in_features, lora.start, lora.end, lora.place, lora.offset, plan.tiles, splits,
            MEMBERS=len(pools), SPLIT=triton_lora.SPLIT_FEATURES, ROWS=plan.rows, RANKS=ranks, FEATURES=128,
            ALIGNED=_is_aligned(pools), WIDEN=x.dtype == torch.float32,
        )  # fmt: skip
    return partial


def _expand(
    y: Tensor, partial: Tensor, pools: Sequence[ModulePool], members: Tensor | None, lora: LoRASegments
) -> None:
    """`partial` [members, splits, num_rows, ≥ max_rank], or without the first dimension for one member."""
    if not lora.num_rows or not lora.max_rank:
        return
    plan, table = triton_lora.plan(lora), _table(pools[0], y)
    width = max(pool.out_features for pool in pools)
    features = 64 if y.dtype == torch.float32 else 128
    triton_lora.expand_kernel[(len(plan.tiles), triton.cdiv(width, features), len(pools))](
        y, y.stride(0), partial, partial.stride(-2), lora.num_rows, partial.shape[-3], table,
        table if members is None else members, pools[0].out_features,
        lora.start, lora.end, lora.place, lora.scale, lora.offset, plan.tiles, plan.overlap,
        MEMBERS=len(pools), ROWS=plan.rows, RANKS=_rank_block(lora), FEATURES=features,
        ALIGNED=_is_aligned(pools), WIDEN=y.dtype == torch.float32,
    )  # fmt: skip


def _table(pool: ModulePool, like: Tensor) -> Tensor:
    if pool.table is not None:
        return pool.table
    parts = (pool.address, pool.rank, pool.offset_a, pool.offset_b, pool.scaling)
    return module_table(*parts, like.element_size()).to(like.device)


def _is_aligned(pools: Sequence[ModulePool]) -> bool:
    return all(pool.is_aligned for pool in pools)


def _rank_block(lora: LoRASegments) -> int:
    return max(16, min(64, triton.next_power_of_2(lora.max_rank)))
