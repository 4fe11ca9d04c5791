"""The Triton kernels of AdaLoRA under the interpreter, against the reference back end."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import FLOOR_MAX, FUZZ_EXAMPLES
from torch import Tensor

import peftkern
from peftkern.backends import ops

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="the interpreter is off"
)
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SHAPES = [(3, 70, 33), (8, 2500, 1100), (1, 4, 9), (5, 64, 64), (0, 8, 8), (17, 1024, 31)]


def layers(shapes, dtype: torch.dtype, grad_dtype: torch.dtype) -> tuple[list, list, int]:
    """E, A and B of layers (r, K, N), their gradients (one is missing), and how many elements."""
    sizes = [size for r, K, N in shapes for size in ((r, 1), (r, K), (N, r))]
    params = [torch.randn(size).to(dtype) for size in sizes]
    grads = [torch.randn(size).to(grad_dtype) for size in sizes]
    grads[len(grads) // 2] = None
    return params, grads, sum(p.numel() for p in params)


def importance(backend: str, params, grads, ipt: Tensor, unc: Tensor) -> tuple[Tensor, ...]:
    ipt, unc = ipt.clone(), unc.clone()
    with peftkern.use_backend(backend):
        scores = ops.adalora_importance_(ipt, unc, params, grads, 0.85, 0.9)
    return scores, ipt, unc


@pytest.mark.parametrize(
    ("dtype", "grad_dtype"), [(F32, F32), (BF16, BF16), (BF16, F32), (F16, F16)]
)
def test_importance(dtype, grad_dtype):
    params, grads, numel = layers(SHAPES, dtype, grad_dtype)
    ipt, unc = torch.rand(numel), torch.rand(numel)
    runs = [importance(name, params, grads, ipt, unc) for name in ("triton", "reference")]
    for got, wanted in zip(*runs, strict=True):
        torch.testing.assert_close(got, wanted, rtol=FLOOR_MAX[F32], atol=FLOOR_MAX[F32])
    again = importance("triton", params, grads, ipt, unc)
    assert all(torch.equal(a, b) for a, b in zip(again, runs[0], strict=True))


def test_importance_of_strided_tensors_and_without_any_gradient():
    params, grads, numel = layers(SHAPES[:2], F32, F32)
    params[1] = params[1].t().contiguous().t()
    grads[5] = grads[5].t().contiguous().t()
    for given_grads in (grads, [None] * len(grads)):
        runs = [
            importance(name, params, given_grads, torch.ones(numel), torch.ones(numel))
            for name in ("triton", "reference")
        ]
        for got, wanted in zip(*runs, strict=True):
            torch.testing.assert_close(got, wanted, rtol=FLOOR_MAX[F32], atol=FLOOR_MAX[F32])


def test_a_gradient_that_is_not_finite_marks_its_triplets_alone():
    params, grads, numel = layers([(4, 20, 30), (4, 20, 30)], F32, F32)
    grads[1][2, 3] = float("nan")
    scores = importance("triton", params, grads, torch.ones(numel), torch.ones(numel))[0]
    assert scores.isnan().nonzero().flatten().tolist() == [2]


@settings(max_examples=FUZZ_EXAMPLES // 4)
@given(
    ranks=st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(any),
    kind=st.sampled_from(["any", "ties", "zero", "nan", "inf"]),
    share=st.floats(0, 1.2),
    threshold=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_allocation(ranks, kind, share, threshold, seed):
    torch.manual_seed(seed)
    total = sum(ranks)
    scores = torch.rand(total)
    if kind == "ties":
        scores = torch.randint(0, 3, (total,)).float()
    elif kind == "zero":
        scores.zero_()
    elif kind != "any":
        scores[torch.rand(total) < 0.3] = float(kind)
    budget = int(share * total)
    results = []
    for name in ("triton", "reference"):
        torch.manual_seed(seed)
        lora_E = [torch.randn(r, 1).to(BF16) for r in ranks]
        with peftkern.use_backend(name):
            results.append((ops.adalora_allocate_(scores, lora_E, budget, threshold), *lora_E))
    for got, wanted in zip(*results, strict=True):
        assert torch.equal(got, wanted)


def test_reasons_against_it():
    params, grads, numel = layers([(300, 4, 4)], F32, F32)
    with peftkern.use_backend("triton"):
        with pytest.raises(peftkern.BackendUnavailableError, match="rank is 300"):
            ops.adalora_importance_(torch.ones(numel), torch.ones(numel), params, grads, 0.5, 0.5)
        params[0] = params[0].to(BF16)
        params[1] = params[1][:4]
        with pytest.raises(peftkern.BackendUnavailableError, match=r"params are torch\.b"):
            ops.adalora_importance_(torch.ones(numel), torch.ones(numel), params, grads, 0.5, 0.5)
        with pytest.raises(peftkern.BackendUnavailableError, match=r"scores are torch\.float64"):
            ops.adalora_allocate_(torch.ones(4).double(), [torch.ones(4, 1)], 2, False)
