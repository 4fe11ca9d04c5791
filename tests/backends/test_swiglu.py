"""The gate of experts with each row's weight, and its gradients, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_as_accurate_as_torch
from torch import Tensor

from peftkern.backends import ops, reference
from peftkern.backends.cpu import module as native

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
SPECIAL = [0.0, -0.0, 1e-45, -1e-38, 3e38, -3e38, 88.9, -88.0, -104.0, torch.inf, -torch.inf]


def eager(u: Tensor, w: Tensor, da: Tensor) -> list[Tensor]:
    """Compute a and the gradients of u and w as modules of experts do."""
    u, w = u.detach().requires_grad_(), w.detach().requires_grad_()
    gate, up = u.chunk(2, dim=-1)
    a = (F.silu(gate) * up * w[:, None]).to(u.dtype)
    return [a.detach(), *torch.autograd.grad(a, (u, w), da)]


def ours(u: Tensor, w: Tensor, da: Tensor) -> list[Tensor]:
    du, dw = ops.run("swiglu_backward", da, u, w, True, True)
    return [ops.run("swiglu_forward", u, w), du, dw.to(w.dtype)]


def operands(rows: int, inner: int, dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
    shapes = ((rows, 2 * inner), (rows,), (rows, inner))
    return [(torch.randn(shape) * scale).to(dtype) for shape in shapes]


@settings(max_examples=40)
@given(
    rows=st.integers(0, 40),
    inner=st.sampled_from([1, 2, 15, 16, 17, 31, 64, 257]),
    dtype=st.sampled_from([F32, BF16, F16]),
    scale=st.sampled_from([1e-3, 1.0, 20.0]),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_as_accurate_as_torch(rows, inner, dtype, scale, threads, seed):
    torch.manual_seed(seed)
    args = operands(rows, inner, dtype, min(scale, 4.0) if dtype is F16 else scale)
    torch.set_num_threads(threads)
    results = [ours(*args), eager(*args), eager(*(t.double() for t in args))]
    for got, plain, right in zip(*results, strict=True):
        assert_as_accurate_as_torch(got, plain, right)


@pytest.mark.parametrize("isa", native.cpu_isas())
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_every_instruction_set(isa, dtype):
    """Layouts that are copied, weights of another type, and results that nobody asks for."""
    u, w, da = operands(19, 70, dtype)
    with native.use_isa(isa):
        got = ours(u.t().contiguous().t(), w.float(), da[:, :1].expand_as(da))
        alone = ops.run("swiglu_backward", da, u, w, False, True)
    plain, right = (
        eager(t(u), t(w.float()), t(da[:, :1].expand_as(da)))
        for t in (lambda t: t, lambda t: t.double())
    )
    for values in zip(got, plain, right, strict=True):
        assert_as_accurate_as_torch(*values)
    assert alone[0].numel() == 0 and alone[1].dtype is F32


@pytest.mark.parametrize("isa", native.cpu_isas())
def test_specials_are_those_of_torch(isa):
    gates, ups = torch.meshgrid(
        torch.tensor([*SPECIAL, torch.nan]), torch.tensor([1.0, -2.0, torch.inf]), indexing="ij"
    )
    u, w = torch.stack([gates.flatten(), ups.flatten()], dim=1), torch.full((gates.numel(),), 0.5)
    args = (u, w, torch.ones(len(u), 1))
    with native.use_isa(isa):
        for got, right in zip(ours(*args), eager(*args), strict=True):
            torch.testing.assert_close(got, right, equal_nan=True)


def test_the_oracle_is_differentiated():
    u, w, da = (t.double() for t in operands(5, 6, F32))
    a, *grads = eager(u, w, da)
    torch.testing.assert_close(reference.swiglu_forward(u, w), a)
    for got, right in zip(reference.swiglu_backward(da, u, w, True, True), grads, strict=True):
        torch.testing.assert_close(got, right)
