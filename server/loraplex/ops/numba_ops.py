"""The operations on a CPU: thin wrappers that hand data pointers to the numba kernels.

Kernels exist for float32 and bfloat16; float16 and tensors whose last dimension is not contiguous take `torch_ops`
(`store_kv` takes every dtype). x, y and the slabs share one dtype, k, v and the caches too; tensors of metadata must
have the dtypes their docstrings state, for the kernels see addresses only. Every kernel is row-invariant: it
reduces in an order given by the lengths alone, whatever the batch and the number of threads.

Threads: kernels split their work over `torch.get_num_threads()` workers on torch's own OpenMP threads
(`numba_threads`); numba's threading layers and their count play no part, and any thread may call. The GIL is free
while a kernel runs. When the cores are shared with other busy threads, start the process with OMP_WAIT_POLICY=passive:
idle OpenMP threads otherwise spin, here as in torch's own products.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from loraplex.ops import (
    AttentionMetadata,
    LayerAttention,
    LoRASegments,
    ModulePool,
    numba_attention,
    numba_lora,
    numba_pointwise,
    numba_sampling,
    torch_ops,
)
from loraplex.ops.numba_threads import SERIAL_WORK
from loraplex.ops.numba_types import BFLOAT16, FLOAT32, LANES

ELEMENTS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}
UNLIMITED = 1 << 62  # the window of a layer without one


def set_num_threads(count: int) -> None:
    """Let torch and the kernels use `count` threads."""
    torch.set_num_threads(count)


def warm_up(dtype: torch.dtype) -> None:
    """Compile every kernel for `dtype` (or load it from numba's cache), so that no request waits for that."""
    if dtype not in ELEMENTS:
        return
    x, y = torch.zeros(1, 1, dtype=dtype), torch.zeros(1, 1, dtype=dtype)
    none = torch.zeros(0, dtype=torch.int32)
    module = ModulePool(1, 1, [], none.long(), none, none.long(), none.long(), torch.zeros(0, dtype=torch.float32))
    lora = LoRASegments(none, none, none, none.float(), none, 1, 1)
    add_lora(y, x, module, lora)
    expand(y, shrink(x, module, lora), module, lora)
    k, cache = torch.zeros(1, 1, 1, dtype=dtype), torch.zeros(1, 1, 1, 1, dtype=dtype)
    zero, ends = torch.zeros(1, dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    store_kv(k, k, cache, cache, zero.long())
    attn = AttentionMetadata(ends, ends[1:], zero.view(1, 1), zero.long(), 1)
    paged_attention(k, cache, cache, attn, LayerAttention(1.0))
    draw(torch.zeros(1, 1), [1])
    rms_norm(x, x[0], 1e-6, plus_one=False)
    silu_mul(x, y)


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """k_cache[slot_mapping[t]] = k[t], v_cache[slot_mapping[t]] = v[t], both in place; any dtype.

    k [T, Hkv, D], v [T, Hkv, Dv]; caches [num_blocks, block_size, Hkv, D or Dv]; slot_mapping int64 [T].
    """
    if k.stride(2) != 1 or v.stride(2) != 1:
        return torch_ops.store_kv(k, v, k_cache, v_cache, slot_mapping)
    size = k.element_size()
    tokens, heads, k_size = k.shape
    numba_attention.store_kv(
        k.data_ptr(),
        _strides(k, size),
        v.data_ptr(),
        _strides(v, size),
        k_cache.data_ptr(),
        _strides(k_cache, size),
        v_cache.data_ptr(),
        _strides(v_cache, size),
        slot_mapping.data_ptr(),
        k_cache.shape[1],
        tokens,
        heads,
        k_size * size,
        v.shape[2] * size,
    )


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, attn: AttentionMetadata, layer: LayerAttention
) -> Tensor:
    """softmax(cap(scale · q·kᵀ)) · v over the keys each token may see: q [T, Hq, D] -> new [T, Hq, Dv], q's dtype.

    See `Ops.paged_attention`; decode and prefill chunks in one call.
    """
    element = ELEMENTS.get(q.dtype)
    if element is None or k_cache.dtype != q.dtype or q.stride(2) != 1:
        return torch_ops.paged_attention(q, k_cache, v_cache, attn, layer)
    size = q.element_size()
    tokens, query_heads, k_size = q.shape
    _, block_size, heads, v_size = v_cache.shape
    out = torch.empty(tokens, query_heads, v_size, dtype=q.dtype)
    group = query_heads // heads
    workers = torch.get_num_threads()
    words = numba_attention.scratch_words(group, k_size, v_size)
    scratch = torch.empty(workers * words, dtype=torch.float32)
    sinks = layer.sinks
    assert sinks is None or sinks.dtype == torch.float32
    tables = attn.block_tables
    numba_attention.paged_attention(
        element,
        q.data_ptr(),
        _strides(q, size),
        out.data_ptr(),
        (query_heads * v_size * size, v_size * size),
        k_cache.data_ptr(),
        _strides(k_cache, size),
        v_cache.data_ptr(),
        _strides(v_cache, size),
        (block_size, k_size, v_size, group),
        heads,
        (
            attn.seq_lens.shape[0],
            attn.cu_seqlens_q.data_ptr(),
            attn.seq_lens.data_ptr(),
            tables.data_ptr(),
            tables.stride(0) * 4,
        ),
        float(layer.scale),
        UNLIMITED if layer.window is None else layer.window,
        0.0 if layer.softcap is None else float(layer.softcap),
        0 if sinks is None else sinks.data_ptr(),
        scratch.data_ptr(),
        4 * words,
        workers,
    )
    return out


def shrink(x: Tensor, pool: ModulePool, lora: LoRASegments) -> Tensor:
    """s[offset_i + t, :rank] = x[start_i + t] @ Aᵀ for every segment i: x [T, in], any row stride -> new float32
    [num_rows, max_rank]; columns past the adapter's rank are undefined."""
    element = ELEMENTS.get(x.dtype)
    if element is None or x.stride(1) != 1:
        return torch_ops.shrink(x, pool, lora)
    s = torch.empty(lora.num_rows, lora.max_rank, dtype=torch.float32)
    numba_lora.shrink(
        element,
        x.data_ptr(),
        x.stride(0) * x.element_size(),
        s.data_ptr(),
        4 * lora.max_rank,
        lora.num_rows,
        _segments(lora),
        _module(pool),
        _workers(lora, pool.in_features),
    )
    return s


def expand(y: Tensor, s: Tensor, pool: ModulePool, lora: LoRASegments) -> None:
    """y[start_i + t] += scale_i · scaling · s[offset_i + t, :rank] @ Bᵀ for every segment i in order, in place.

    y [T, out], any row stride; s float32 [num_rows, max_rank]. Summed in float32, rounded once per segment.
    """
    element = ELEMENTS.get(y.dtype)
    if element is None or y.stride(1) != 1:
        return torch_ops.expand(y, s, pool, lora)
    numba_lora.expand(
        element,
        y.data_ptr(),
        y.stride(0) * y.element_size(),
        s.data_ptr(),
        4 * s.stride(0),
        _segments(lora),
        _module(pool),
        _workers(lora, pool.out_features),
    )


def add_lora(y: Tensor, x: Tensor, pool: ModulePool, lora: LoRASegments) -> None:
    """y[s:e] += scale · (x[s:e] @ Aᵀ) @ Bᵀ for every segment, in place: expand of shrink, in one call."""
    element = ELEMENTS.get(x.dtype)
    if element is None or y.dtype != x.dtype or x.stride(1) != 1 or y.stride(1) != 1:
        return torch_ops.add_lora(y, x, pool, lora)
    s = torch.empty(lora.num_rows, lora.max_rank, dtype=torch.float32)
    size = x.element_size()
    numba_lora.add_lora(
        element,
        y.data_ptr(),
        y.stride(0) * size,
        x.data_ptr(),
        x.stride(0) * size,
        s.data_ptr(),
        4 * lora.max_rank,
        lora.num_rows,
        _segments(lora),
        _module(pool),
        _workers(lora, pool.in_features + pool.out_features),
    )


def draw(logits: Tensor, keys: Sequence[int]) -> Tensor:
    """argmax over v of logits[r, v] + Gumbel noise of (keys[r], v): logits float32 [R, V] -> int64 [R].

    Any row stride. The noise is that of `torch_ops` up to the rounding of its logarithms.
    """
    if logits.dtype != torch.float32 or logits.stride(1) != 1:
        return torch_ops.draw(logits, keys)
    rows, vocabulary = logits.shape
    halves = torch.tensor([[key & 0xFFFFFFFF for key in keys], [key >> 32 for key in keys]], dtype=torch.int64)
    out = torch.empty(rows, dtype=torch.int64)
    workers = 1 if rows * vocabulary < SERIAL_WORK // 8 else torch.get_num_threads()
    scratch = torch.empty(workers * 2 * LANES)
    low, high = halves[0].data_ptr(), halves[1].data_ptr()
    numba_sampling.draw(
        logits.data_ptr(),
        logits.stride(0) * 4,
        rows,
        vocabulary,
        low,
        high,
        out.data_ptr(),
        scratch.data_ptr(),
        workers,
    )
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, plus_one: bool) -> Tensor:
    """weight · x / sqrt(mean(x²) + eps) over the last dimension, with (1 + weight) for `plus_one`: x [..., H] of a
    dtype in ELEMENTS, weight [H] -> new contiguous [..., H] (Zhang and Sennrich 2019; the roundings of transformers'
    LlamaRMSNorm, or of GemmaRMSNorm)."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    count, size = rows.shape
    workers = 1 if count * size < SERIAL_WORK // 8 else torch.get_num_threads()
    element = ELEMENTS[x.dtype]
    numba_pointwise.rms_norm(
        element, rows.data_ptr(), weight.data_ptr(), out.data_ptr(), count, size, eps, plus_one, workers
    )
    return out


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up: [..., N] of a dtype in ELEMENTS -> new contiguous [..., N] (Shazeer 2020; torch's roundings)."""
    size = gate.shape[-1]
    a, b = gate.reshape(-1, size), up.reshape(-1, size)
    out = torch.empty(gate.shape, dtype=gate.dtype)
    workers = 1 if out.numel() < SERIAL_WORK // 8 else torch.get_num_threads()
    bytes_each = gate.element_size()
    numba_pointwise.silu_mul(
        ELEMENTS[gate.dtype],
        a.data_ptr(),
        a.stride(0) * bytes_each,
        b.data_ptr(),
        b.stride(0) * bytes_each,
        out.data_ptr(),
        len(a),
        size,
        workers,
    )
    return out


def _strides(tensor: Tensor, size: int) -> tuple[int, ...]:
    """The strides but the last, in bytes."""
    return tuple([stride * size for stride in tensor.stride()[:-1]])


def _segments(lora: LoRASegments) -> tuple[int, ...]:
    if lora.addresses is None:  # asking 84 modules' tensors where they lie costs more than their kernels at batch 1
        lora.addresses = (
            lora.start.shape[0],
            lora.start.data_ptr(),
            lora.end.data_ptr(),
            lora.place.data_ptr(),
            lora.scale.data_ptr(),
            lora.offset.data_ptr(),
        )
    return lora.addresses


def _module(pool: ModulePool) -> tuple[int, ...]:
    if pool.addresses is None:
        pool.addresses = (
            pool.in_features,
            pool.out_features,
            pool.address.data_ptr(),
            pool.rank.data_ptr(),
            pool.offset_a.data_ptr(),
            pool.offset_b.data_ptr(),
            pool.scaling.data_ptr(),
        )
    return pool.addresses


def _workers(lora: LoRASegments, features: int) -> int:
    """Threads worth using for max_rank · features multiply-adds a row. No result depends on it."""
    if lora.num_rows * lora.max_rank * features < SERIAL_WORK:
        return 1
    return torch.get_num_threads()
