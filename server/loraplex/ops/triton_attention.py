"""Triton kernels of attention over the paged cache, and of writing it.

    decode    sequences of one new token: the keys are cut at fixed positions, each part is one program, and a second
              kernel adds the parts in order
    prefill   all others: a program has a tile of new tokens, with all query heads of a key/value head, and goes over
              the keys from the first that any of them sees to the last

Softmax in float32 with running maxima, in powers of two. A sequence's parts are cut by its own positions alone, so a
token's bits depend on no neighbour; but a token computed by one kernel may differ in the last bits from the other's.
Sources: Dao et al. 2022 (FlashAttention), Dao et al. 2023 (Flash-Decoding), Kwon et al. 2023 (PagedAttention).
"""

# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false
# (a kernel's parameters are what its compiler makes of the arguments)

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def store_kernel(
    source, stride_token, stride_head, cache, stride_block, stride_row, stride_cache_head, slots,
    block_size, num_heads, size, HEADS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Program t: cache[slot of t] = source[t]. A negative slot is padding."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if slot < 0:
        return
    head, lane = tl.arange(0, HEADS), tl.arange(0, SIZE)
    mask = (head < num_heads)[:, None] & (lane < size)[None, :]
    value = tl.load(source + token * stride_token + head[:, None] * stride_head + lane[None, :], mask=mask)
    row = cache + (slot // block_size) * stride_block + (slot % block_size) * stride_row
    tl.store(row + head[:, None] * stride_cache_head + lane[None, :], value, mask=mask)


@triton.jit
def capped(logits, softcap):
    """softcap · tanh(logits / softcap), by exp of what is not positive."""
    t = tl.exp(-2.0 * tl.abs(logits) / softcap)
    magnitude = softcap * (1.0 - t) / (1.0 + t)
    return tl.where(logits < 0, -magnitude, magnitude)


@triton.jit
def attend(
    q, k_cache, stride_kb, stride_ks, v_cache, stride_vb, stride_vs, table, position, has_row,
    low, high, window, scale, softcap, size, value_size, block_size, most, denominator, total,
    KEYS: tl.constexpr, SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """The rows q [ROWS, SIZE] at `position` over the keys low:high of the blocks in `table`, joined to what `most`,
    `denominator` and `total` hold. Keys before `low` and after `high` are not read."""
    lane, value_lane = tl.arange(0, SIZE), tl.arange(0, VALUE_SIZE)
    for base in range(low // KEYS * KEYS, high, KEYS):
        key = base + tl.arange(0, KEYS)
        is_read = (key >= low) & (key < high)
        block = tl.load(table + key // block_size, mask=is_read, other=0).to(tl.int64)
        at = key % block_size
        k_where = k_cache + (block * stride_kb + at * stride_ks)[:, None] + lane[None, :]
        k = tl.load(k_where, mask=is_read[:, None] & (lane < size)[None, :], other=0.0)
        if WIDEN:
            logits = tl.dot(q.to(tl.float32), tl.trans(k.to(tl.float32)), input_precision="ieee")
        else:
            logits = tl.dot(q, tl.trans(k))
        logits = logits * scale
        if HAS_CAP:
            logits = capped(logits, softcap)
        visible = is_read[None, :] & (key[None, :] <= position[:, None]) & has_row[:, None]
        if HAS_WINDOW:
            visible = visible & (key[None, :] > position[:, None] - window)
        logits = tl.where(visible, logits * LOG2_E, float("-inf"))
        highest = tl.maximum(most, tl.max(logits, axis=1))
        finite = tl.where(highest == float("-inf"), 0.0, highest)
        weight = tl.exp2(logits - finite[:, None])
        fade = tl.exp2(most - finite)
        denominator = denominator * fade + tl.sum(weight, axis=1)
        v_where = v_cache + (block * stride_vb + at * stride_vs)[:, None] + value_lane[None, :]
        v = tl.load(v_where, mask=is_read[:, None] & (value_lane < value_size)[None, :], other=0.0)
        if WIDEN:
            total = tl.dot(weight, v.to(tl.float32), total * fade[:, None], input_precision="ieee")
        else:
            total = tl.dot(weight.to(v.dtype), v, total * fade[:, None])
        most = highest
    return most, denominator, total


@triton.jit(do_not_specialize=["num_seqs", "window"])
def prefill_kernel(
    q, stride_qt, stride_qh, out, stride_ot, stride_oh,
    k_cache, stride_kb, stride_ks, stride_kh, v_cache, stride_vb, stride_vs, stride_vh,
    bounds, seq_lens, tables, stride_table, sinks, num_seqs, group,
    window, scale, softcap, size, value_size, block_size,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, KEYS: tl.constexpr, SEQS: tl.constexpr, SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Program (tile, key/value head). Tiles of TOKENS tokens are numbered as LoRA's are: the first of sequence i is
    bounds[i] // TOKENS + i. Row r of a tile is token r // group, query head r % group of the head's group."""
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    seq = -1
    for base in range(0, num_seqs, SEQS):
        other = base + tl.arange(0, SEQS)
        first_tile = tl.load(bounds + other, mask=other < num_seqs, other=0) // TOKENS + other
        seq += tl.sum(((first_tile <= tile) & (other < num_seqs)).to(tl.int32), axis=0)
    begin, stop = tl.load(bounds + seq), tl.load(bounds + seq + 1)
    first = begin + (tile - begin // TOKENS - seq) * TOKENS
    if (first >= stop) | (stop - begin == 1):
        return
    length = tl.load(seq_lens + seq)
    row = tl.arange(0, ROWS)
    token = first + row // group
    has_row = (row < TOKENS * group) & (token < stop)
    head = kv_head * group + row % group
    position = length - stop + token
    lane = tl.arange(0, SIZE)
    q_where = q + token.to(tl.int64)[:, None] * stride_qt + head[:, None] * stride_qh + lane[None, :]
    q_rows = tl.load(q_where, mask=has_row[:, None] & (lane < size)[None, :], other=0.0)
    last = tl.minimum(first + TOKENS, stop)
    low, high = 0, length - stop + last
    if HAS_WINDOW:
        low = tl.maximum(0, length - stop + first - window + 1)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    denominator = tl.zeros([ROWS], tl.float32)
    if HAS_SINKS:
        most = tl.load(sinks + head, mask=has_row, other=0.0) * LOG2_E
        denominator += 1.0
    most, denominator, total = attend(
        q_rows, k_cache + kv_head * stride_kh, stride_kb, stride_ks, v_cache + kv_head * stride_vh, stride_vb,
        stride_vs, tables + seq.to(tl.int64) * stride_table, position, has_row, low, high, window, scale, softcap, size,
        value_size, block_size, most, denominator, tl.zeros([ROWS, VALUE_SIZE], tl.float32),
        KEYS, SIZE, VALUE_SIZE, HAS_WINDOW, HAS_CAP, WIDEN,
    )  # fmt: skip
    value_lane = tl.arange(0, VALUE_SIZE)
    where = out + token.to(tl.int64)[:, None] * stride_ot + head[:, None] * stride_oh + value_lane[None, :]
    result = total / tl.where(denominator == 0, 1.0, denominator)[:, None]
    tl.store(where, result.to(out.dtype.element_ty), mask=has_row[:, None] & (value_lane < value_size)[None, :])


@triton.jit(do_not_specialize=["num_splits", "window"])
def decode_kernel(
    q, stride_qt, stride_qh, totals, mosts, denominators, num_splits,
    k_cache, stride_kb, stride_ks, stride_kh, v_cache, stride_vb, stride_vs, stride_vh,
    bounds, seq_lens, tables, stride_table, group, num_heads,
    window, scale, softcap, size, value_size, block_size,
    SPLIT: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Program (sequence, key/value head, split): keys split · SPLIT and SPLIT - 1 more. totals [B, Hq, num_splits, Dv],
    mosts and denominators [B, Hq, num_splits], float32."""
    seq, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin = tl.load(bounds + seq)
    if tl.load(bounds + seq + 1) - begin != 1:
        return
    length = tl.load(seq_lens + seq)
    low, high = split * SPLIT, tl.minimum(split * SPLIT + SPLIT, length)
    if HAS_WINDOW:
        low = tl.maximum(low, length - window)
    if low >= high:
        return
    row = tl.arange(0, ROWS)
    has_row = row < group
    head = kv_head * group + row
    lane = tl.arange(0, SIZE)
    q_where = q + begin.to(tl.int64) * stride_qt + head[:, None] * stride_qh + lane[None, :]
    q_rows = tl.load(q_where, mask=has_row[:, None] & (lane < size)[None, :], other=0.0)
    position = tl.zeros([ROWS], tl.int32) + (length - 1)
    most, denominator, total = attend(
        q_rows, k_cache + kv_head * stride_kh, stride_kb, stride_ks, v_cache + kv_head * stride_vh, stride_vb,
        stride_vs, tables + seq.to(tl.int64) * stride_table, position, has_row, low, high, window, scale, softcap, size,
        value_size, block_size, tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32),
        tl.zeros([ROWS, VALUE_SIZE], tl.float32), KEYS, SIZE, VALUE_SIZE, HAS_WINDOW, HAS_CAP, WIDEN,
    )  # fmt: skip
    part = (seq.to(tl.int64) * num_heads + head) * num_splits + split
    tl.store(mosts + part, most, mask=has_row)
    tl.store(denominators + part, denominator, mask=has_row)
    value_lane = tl.arange(0, VALUE_SIZE)
    where = totals + part[:, None] * value_size + value_lane[None, :]
    tl.store(where, total, mask=has_row[:, None] & (value_lane < value_size)[None, :])


@triton.jit(do_not_specialize=["num_splits", "window"])
def combine_kernel(
    out, stride_ot, stride_oh, totals, mosts, denominators, num_splits, bounds, seq_lens, sinks, num_heads, window,
    value_size, SPLIT: tl.constexpr, VALUE_SIZE: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """Program (sequence, query head): the parts of `decode_kernel`, from the first key on."""
    seq, head = tl.program_id(0), tl.program_id(1)
    begin = tl.load(bounds + seq)
    if tl.load(bounds + seq + 1) - begin != 1:
        return
    length = tl.load(seq_lens + seq)
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(0, length - window) // SPLIT
    lane = tl.arange(0, VALUE_SIZE)
    most = tl.full([1], float("-inf"), tl.float32)
    denominator = tl.zeros([1], tl.float32)
    if HAS_SINKS:
        most = tl.zeros([1], tl.float32) + tl.load(sinks + head) * LOG2_E
        denominator += 1.0
    total = tl.zeros([VALUE_SIZE], tl.float32)
    for split in range(first, tl.cdiv(length, SPLIT)):
        part = (seq.to(tl.int64) * num_heads + head) * num_splits + split
        own = tl.load(mosts + part)
        highest = tl.maximum(most, own)
        finite = tl.where(highest == float("-inf"), 0.0, highest)
        fade, share = tl.exp2(most - finite), tl.exp2(own - finite)
        denominator = denominator * fade + tl.load(denominators + part) * share
        value = tl.load(totals + part * value_size + lane, mask=lane < value_size, other=0.0)
        total = total * fade + value * share
        most = highest
    where = out + begin.to(tl.int64) * stride_ot + head * stride_oh + lane
    tl.store(
        where, (total / tl.where(denominator == 0, 1.0, denominator)).to(out.dtype.element_ty), mask=lane < value_size
    )
