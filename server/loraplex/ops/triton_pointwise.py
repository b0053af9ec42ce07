"""Triton kernels of small things that most decoders do between their products, each in one pass."""

import triton
import triton.language as tl


@triton.jit
def rms_norm_kernel(x, stride, weight, out, size, eps, PLUS_ONE: tl.constexpr, SIZE: tl.constexpr):
    """Program r: out[r] = weight · x[r] / sqrt(mean(x[r]²) + eps), or (1 + weight) · …, out contiguous."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, SIZE)
    mask = lane < size
    dtype: tl.constexpr = x.dtype.element_ty
    value = tl.load(x + row * stride + lane, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(weight + lane, mask=mask, other=0.0).to(tl.float32)
    value = value * (1.0 / tl.sqrt(tl.sum(value * value, axis=0) / size + eps))
    value = value * (1.0 + w) if PLUS_ONE else value.to(dtype).to(tl.float32) * w
    tl.store(out + row * size + lane, value.to(dtype), mask=mask)


@triton.jit
def silu_mul_kernel(gate, stride_gate, up, stride_up, out, size, SIZE: tl.constexpr):
    """Program (r, part): out[r] = silu(gate[r]) · up[r] over SIZE numbers, out contiguous."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    mask = lane < size
    dtype: tl.constexpr = gate.dtype.element_ty
    g = tl.load(gate + row * stride_gate + lane, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * stride_up + lane, mask=mask, other=0.0).to(tl.float32)
    activated = (g * tl.sigmoid(g)).to(dtype).to(tl.float32)
    tl.store(out + row * size + lane, (activated * u).to(dtype), mask=mask)
