"""Triton kernels of `draw`: the noise of `noise`, hashed where the logits are read, and the argmax of each row."""

import triton
import triton.language as tl


@triton.jit
def mixed(x):
    """The finaliser of MurmurHash3 (Appleby, public domain) on uint32."""
    x = x ^ (x >> 16)
    x = x * 0x85EBCA6B
    x = x ^ (x >> 13)
    x = x * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def gumbel(token, low, high):
    """Noise for the token ids `token` uint32 under the key (low, high) uint32."""
    bits = mixed(mixed(token ^ low) ^ high)
    u = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 1.0 - 5.9604644775390625e-08)
    # log1p(-u) by Kahan: what 1 - u loses is in both factors
    rest = 1.0 - u
    exact = tl.where(rest == 1.0, -u, tl.log(rest) * (u / tl.where(rest == 1.0, 1.0, 1.0 - rest)))
    return -tl.log(-exact)


@triton.jit(do_not_specialize=["num_rows", "num_parts"])
def draw_kernel(
    logits, stride, keys, num_rows, vocabulary, values, tokens, num_parts, PART: tl.constexpr, SIZE: tl.constexpr
):
    """Program (row, part): the largest of logits + noise over PART tokens, and the first token that has it."""
    row, part = tl.program_id(0), tl.program_id(1)
    low = tl.load(keys + row).to(tl.uint32)
    high = tl.load(keys + num_rows + row).to(tl.uint32)
    best = tl.full([SIZE], float("-inf"), tl.float32)
    chosen = tl.zeros([SIZE], tl.int32) + part * PART
    for base in range(part * PART, tl.minimum(part * PART + PART, vocabulary), SIZE):
        token = base + tl.arange(0, SIZE)
        value = tl.load(logits + row.to(tl.int64) * stride + token, mask=token < vocabulary, other=float("-inf"))
        value = value + gumbel(token.to(tl.uint32), low, high)
        is_better = value > best
        best, chosen = tl.where(is_better, value, best), tl.where(is_better, token, chosen)
    highest = tl.max(best, axis=0)
    tl.store(values + row * num_parts + part, highest)
    tl.store(tokens + row * num_parts + part, tl.min(tl.where(best == highest, chosen, 0x7FFFFFFF), axis=0))


@triton.jit(do_not_specialize=["num_parts"])
def choose_kernel(values, tokens, out, num_parts, vocabulary, PARTS: tl.constexpr):
    """Program (row): the token of the first part whose value is the largest; 0 for a row that is not a number."""
    row = tl.program_id(0)
    lane = tl.arange(0, PARTS)
    value = tl.load(values + row * num_parts + lane, mask=lane < num_parts, other=float("-inf"))
    token = tl.load(tokens + row * num_parts + lane, mask=lane < num_parts, other=0x7FFFFFFF)
    found = tl.min(tl.where(value == tl.max(value, axis=0), token, 0x7FFFFFFF), axis=0)
    tl.store(out + row, tl.where(found < vocabulary, found, 0).to(tl.int64))
