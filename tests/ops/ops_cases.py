"""Builders of batches for the tests of the ops: adapters in a pool, segments over rows, paged sequences.

What a kernel must not read is NaN: the gaps between the matrices of a slab, the cache past a sequence's end.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex.ops import AttentionMetadata, LoRASegments, ModulePool

DTYPES = [torch.float32, torch.bfloat16]
GAP = 3  # NaNs before A, between A and Bt, after Bt


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(seed)).to(dtype)


def make_pool(
    ranks: Sequence[int], in_features: int, out_features: int, dtype: torch.dtype, seed: int = 0
) -> ModulePool:
    """One adapter a place, of the given ranks; rank 0: the adapter lacks the module (every third such place is
    free). Values are normal; scalings differ."""
    slabs: list[Tensor | None] = []
    for place, rank in enumerate(ranks):
        size_a, size_b = rank * in_features, rank * out_features
        slab = torch.full((3 * GAP + size_a + size_b,), float("nan"), dtype=dtype)
        slab[GAP : GAP + size_a] = normal(size_a, seed=seed + 2 * place, dtype=dtype)
        slab[2 * GAP + size_a : 2 * GAP + size_a + size_b] = normal(size_b, seed=seed + 2 * place + 1, dtype=dtype)
        slabs.append(None if rank == 0 and place % 3 == 0 else slab)
    count = len(ranks)
    return ModulePool(
        in_features,
        out_features,
        slabs,
        address=torch.tensor([0 if slab is None else slab.data_ptr() for slab in slabs], dtype=torch.int64),
        rank=torch.tensor(list(ranks), dtype=torch.int32),
        offset_a=torch.full((count,), GAP, dtype=torch.int64),
        offset_b=torch.tensor([2 * GAP + rank * in_features for rank in ranks], dtype=torch.int64),
        scaling=torch.tensor([0.5 + 0.25 * place for place in range(count)], dtype=torch.float32),
    )


def matrices(pool: ModulePool, place: int) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] of a place in float64, by plain slicing."""
    rank, slab = int(pool.rank[place]), pool.slabs[place]
    if rank == 0:
        return torch.zeros(0, pool.in_features).double(), torch.zeros(pool.out_features, 0).double()
    assert slab is not None
    a = slab[GAP : GAP + rank * pool.in_features].view(rank, pool.in_features)
    bt = slab[2 * GAP + rank * pool.in_features : -GAP].view(rank, pool.out_features)
    return a.double(), bt.double().T


def make_segments(spans: Sequence[tuple[int, int, int, float]], pool: ModulePool) -> LoRASegments:
    """Segments from (start, end, place, scale)."""
    start, end, place, scale = (list(column) for column in zip(*spans, strict=True)) if spans else ([], [], [], [])
    lengths = [e - s for s, e in zip(start, end, strict=True)]
    offset = [sum(lengths[:i]) for i in range(len(lengths))]

    def int32(values: list) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    max_rank = max((int(pool.rank[p]) for p in place), default=0)
    scales = torch.tensor(scale, dtype=torch.float32)
    return LoRASegments(int32(start), int32(end), int32(place), scales, int32(offset), sum(lengths), max_rank)


def strided(rows: int, columns: int, dtype: torch.dtype, seed: int, pad: int = 5) -> Tensor:
    """A view [rows, columns] whose rows are `pad` elements apart; the padding is NaN."""
    whole = torch.full((rows, columns + pad), float("nan"), dtype=dtype)
    whole[:, :columns] = normal(rows, columns, seed=seed, dtype=dtype)
    return whole[:, :columns]


@dataclass
class Heads:
    """Query heads, key/value heads, head size of q and k, head size of v."""

    query: int
    kv: int
    size: int
    value_size: int


@dataclass
class Paged:
    """A batch of sequences: the arguments of `paged_attention`, and the keys and values by sequence."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    attn: AttentionMetadata
    keys: list[Tensor]
    values: list[Tensor]

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, AttentionMetadata]:
        return self.q, self.k_cache, self.v_cache, self.attn


def make_paged(
    chunks: Sequence[tuple[int, int]],
    heads: Heads,
    dtype: torch.dtype,
    block_size: int = 16,
    seed: int = 0,
    names: Sequence[int] | None = None,
) -> Paged:
    """Sequences given as (tokens before, new tokens), their blocks scattered over the cache.

    The contents depend on (seed, name of the sequence, position) alone, not on the chunk or on the batch; a
    sequence's name is its index unless `names` says otherwise. Cache past a sequence's end is NaN.
    """
    names = list(range(len(chunks))) if names is None else list(names)
    lengths = [before + new for before, new in chunks]
    counts = [-(-length // block_size) for length in lengths]
    shuffled = torch.randperm(sum(counts) + 2, generator=generator(seed + 999)).int()
    tables = torch.full((len(chunks), max(counts, default=0) + 1), 2**30, dtype=torch.int32)
    k_cache = torch.full((len(shuffled), block_size, heads.kv, heads.size), float("nan"), dtype=dtype)
    v_cache = torch.full((len(shuffled), block_size, heads.kv, heads.value_size), float("nan"), dtype=dtype)
    queries, keys, values, slots = [], [], [], []
    for i, ((before, new), name) in enumerate(zip(chunks, names, strict=True)):
        blocks = shuffled[sum(counts[:i]) : sum(counts[: i + 1])]
        tables[i, : counts[i]] = blocks
        longest = 1024  # so that a token's numbers do not depend on the sequence's length
        base = 10_000 * seed + 10 * name
        q = normal(longest, heads.query, heads.size, seed=base, dtype=dtype)
        k = normal(longest, heads.kv, heads.size, seed=base + 1, dtype=dtype)[: before + new]
        v = normal(longest, heads.kv, heads.value_size, seed=base + 2, dtype=dtype)[: before + new]
        position = torch.arange(before + new)
        slot = blocks[position // block_size].long() * block_size + position % block_size
        k_cache.flatten(0, 1)[slot] = k
        v_cache.flatten(0, 1)[slot] = v
        queries.append(q[before : before + new])
        keys.append(k)
        values.append(v)
        slots.append(slot[before:])
    cu = torch.tensor([0] + [new for _, new in chunks]).cumsum(0).int()
    attn = AttentionMetadata(cu, torch.tensor(lengths, dtype=torch.int32), tables, torch.cat(slots), block_size)
    return Paged(torch.cat(queries), k_cache, v_cache, attn, keys, values)
