"""Roundings of the low-rank products, simulated: those chosen keep the bound, cheaper ones do not.

NUMERICS.md quotes the shares of the bound; the kernels themselves are tested in test_kernels.py.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from peftkern.backends.tolerances import FLOOR_MAX, FLOOR_RMS, RATIO, errors

M, N, K = 256, 512, 512
SCALING = 1.5
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def truncated(x: Tensor) -> Tensor:
    """The 11 bits of a float32 operand that tensor cores multiply in tf32."""
    return (x.contiguous().view(torch.int32) & ~0x1FFF).view(F32)


def pieces(x: Tensor, count: int) -> Tensor:
    """The sum of so many bfloat16 pieces of x."""
    total = torch.zeros_like(x)
    for _ in range(count):
        total += (x - total).to(BF16).to(F32)
    return total


def share(got: Tensor, eager: Tensor, oracle: Tensor) -> float:
    """The error as a share of the tests' bound."""
    (rms, most), (eager_rms, eager_most) = errors(got, oracle), errors(eager, oracle)
    return max(
        rms / (RATIO * eager_rms + FLOOR_RMS[got.dtype]),
        most / (RATIO * eager_most + FLOOR_MAX[got.dtype]),
    )


class Update:
    """One layer in eager torch, in float64, and with a product of S rounded in some way."""

    def __init__(self, dtype: torch.dtype, factors: torch.dtype, r: int, base: float) -> None:
        self.x, self.dy = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
        self.W = (base * torch.randn(N, K) / K**0.5).to(dtype)
        self.A = (torch.randn(r, K) / K**0.5).to(factors)
        self.B = (torch.randn(N, r) / r**0.5).to(factors)
        self.S = self.x.float() @ self.A.float().t()

    def share_of_y(self, S: Tensor, B: Tensor) -> float:
        exact = self.x.double() @ self.A.double().t() @ self.B.double().t() * SCALING
        exact += self.x.double() @ self.W.double().t()
        update = (self.x.to(self.A.dtype) @ self.A.t()) @ self.B.t() * SCALING
        eager = (self.x @ self.W.t() + update).to(self.x.dtype)
        first = (SCALING * S @ B.t()).to(self.x.dtype)
        got = (first.float() + self.x.float() @ self.W.float().t()).to(self.x.dtype)
        return share(got, eager, exact)

    def share_of_dB(self, S: Tensor) -> float:
        exact = self.dy.double().t() @ (self.x.double() @ self.A.double().t())
        eager = self.dy.to(self.B.dtype).t() @ (self.x.to(self.A.dtype) @ self.A.t())
        return share((self.dy.float().t() @ S).to(self.B.dtype), eager, exact)


@pytest.mark.parametrize(("r", "base"), list(itertools.product((8, 64), (0.0, 1.0))))
def test_update_of_y(r, base):
    """A bfloat16 y shows neither tf32 nor, with bfloat16 factors, S in bfloat16; float16 does."""
    for dtype, kept in ((BF16, True), (F16, False)):
        u = Update(dtype, F32, r, base)
        assert (u.share_of_y(truncated(u.S), truncated(u.B)) < 0.75) is kept
        assert (u.share_of_y(truncated(u.S), truncated(u.B)) > 1.0) is not kept
        assert u.share_of_y(u.S, u.B) < 0.6
    u = Update(BF16, BF16, r, base)
    assert u.share_of_y(u.S.to(BF16).float(), u.B.float()) < 0.5


@pytest.mark.parametrize("r", [8, 64])
def test_gradient_of_lora_B(r):
    """In float32 it needs all pieces of S, in bfloat16 one."""
    u = Update(BF16, F32, r, 1.0)
    assert u.share_of_dB(pieces(u.S, 3)) < 0.5
    assert min(u.share_of_dB(pieces(u.S, n)) for n in (1, 2)) > 1.0
    u = Update(BF16, BF16, r, 1.0)
    assert u.share_of_dB(pieces(u.S, 1)) < 0.5
    u = Update(F16, F32, r, 1.0)
    high = truncated(u.S)
    assert u.share_of_dB(high + truncated(u.S - high)) < 0.5 < 1.0 < u.share_of_dB(high)
