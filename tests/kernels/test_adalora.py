"""The Triton kernels of AdaLoRA under the interpreter, against the reference back end."""

from __future__ import annotations

import pytest
import torch
from adalora_cases import (
    SHAPES,
    assert_near,
    check_allocation,
    importance,
    layers,
    random_scores,
)
from grids import examples
from hypothesis import given
from hypothesis import strategies as st
from interpreted import INTERPRETED
from linear_cases import BF16, F16, F32
from torch import Tensor

import peftkern
from peftkern.backends import ops

pytestmark = INTERPRETED


def check(params, grads, ipt: Tensor, unc: Tensor) -> None:
    """As the reference, and with equal bits again."""
    got, wanted, again = (
        importance(name, params, grads, ipt, unc) for name in ("triton", "reference", "triton")
    )
    assert_near(got, wanted)
    assert all(torch.equal(a, b) for a, b in zip(again, got, strict=True))


@pytest.mark.parametrize(
    ("dtype", "grad_dtype"), [(F32, F32), (BF16, BF16), (BF16, F32), (F16, F16)]
)
def test_importance(dtype, grad_dtype):
    params, grads, numel = layers(SHAPES, dtype, grad_dtype)
    check(params, grads, torch.rand(numel), torch.rand(numel))


def test_importance_of_strided_tensors_and_without_any_gradient():
    params, grads, numel = layers(SHAPES[:2], F32, F32)
    params[1] = params[1].t().contiguous().t()
    grads[5] = grads[5].t().contiguous().t()
    for given_grads in (grads, [None] * len(grads)):
        check(params, given_grads, torch.ones(numel), torch.ones(numel))


def test_a_gradient_that_is_not_finite_marks_its_triplets_alone():
    params, grads, numel = layers([(4, 20, 30), (4, 20, 30)], F32, F32)
    grads[1][2, 3] = float("nan")
    scores = importance("triton", params, grads, torch.ones(numel), torch.ones(numel))[0]
    assert scores.isnan().nonzero().flatten().tolist() == [2]


@examples(1 / 4)
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
    lora_E = [torch.randn(r, 1).to(BF16) for r in ranks]
    check_allocation(random_scores(kind, total), lora_E, int(share * total), threshold)


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
