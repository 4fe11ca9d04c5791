"""Alternatives to what Triton's interpreter (TRITON_INTERPRET=1) cannot run as it is compiled.

The interpreter runs kernels in NumPy on a CPU. It keeps bfloat16 as 16-bit integers, so arithmetic
on it would multiply bit patterns, and its cast to bfloat16 truncates. Compiled, each function here
is the one operation that its last line names.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Round float32 x to nearest even in dtype."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        halves = tl.where(x == x, rounded, 0x7FC0)
        return halves.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def dropped(x, keep):
    """Zero what of x is not kept (NaN for Inf and NaN, as nn.Dropout multiplies)."""
    if INTERPRETED:
        return narrow(x.to(tl.float32) * keep.to(tl.float32), x.dtype)
    else:
        return x * keep.to(x.dtype)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """Compute a @ b in float32; float32 operands as PRECISION says, 16-bit products are exact."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
        if PRECISION == "tf32":  # tensor cores leave the lower 13 bits out
            a = (a.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)
            b = (b.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)
    return tl.dot(a, b, input_precision=PRECISION)
