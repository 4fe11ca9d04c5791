"""PiSSA and OLoRA against dense decompositions, and the base that they leave."""

from __future__ import annotations

import pytest
import torch
from low_rank_svd_cases import power_law

from peftkern import quantize_nf4
from peftkern.functional import dequantize_nf4
from peftkern.methods.initialization.factors import olora, pissa, subtract_update_


@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (700, 640)])
@pytest.mark.parametrize("scaling", [1.0, 0.5, 3.0])
def test_pissa_takes_the_largest_triplets(shape, scaling):
    weight = power_law(*shape, 1.0)
    factors = pissa([weight], 8, scaling, tol=1e-6, certify=True)[0]
    U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    best = (U[:, :8] * S[:8]) @ Vh[:8]
    update = scaling * factors.lora_B.double() @ factors.lora_A.double()
    torch.testing.assert_close(update, best, rtol=0, atol=2e-5 * best.norm().item())
    for sizes in (factors.lora_A.norm(dim=1), factors.lora_B.norm(dim=0)):
        torch.testing.assert_close(sizes.double(), (S[:8] / scaling).sqrt(), rtol=1e-5, atol=0)
    kept = float(S[:8].square().sum() / S.square().sum())
    assert factors.energy == pytest.approx(kept, rel=1e-5)
    least = float(S[8:].square().sum().sqrt())
    excess = float((weight - update).norm()) / least - 1
    assert excess <= factors.certificate < 1e-3 and factors.excess < 1e-6


@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (130, 33)])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "nf4", "transposed"])
def test_olora_is_the_beginning_of_the_whole_qr(monkeypatch, shape, kind):
    """By more than one panel."""
    monkeypatch.setattr("peftkern.functional.panels._ON_CPU", 256)
    monkeypatch.setattr("peftkern.functional.panels._LEAST", 1)
    weight = power_law(*shape, 0.5)
    if kind == "nf4":
        given = quantize_nf4(weight)
        weight = dequantize_nf4(given)
    elif kind == "transposed":
        given = weight.T.contiguous().T
    else:
        given = weight = weight.to(getattr(torch, kind))
    factors = olora(given, 6)
    Q, R = torch.linalg.qr(weight.float())
    torch.testing.assert_close(factors.lora_B, Q[:, :6], rtol=0, atol=1e-5)
    torch.testing.assert_close(factors.lora_A, R[:6], rtol=0, atol=1e-5 * float(R.norm()))
    kept = (R[:6].norm() / weight.float().norm()).item() ** 2
    assert factors.energy == pytest.approx(kept, rel=1e-5)


def test_olora_of_columns_that_depend_on_each_other():
    weight = power_law(40, 30, 0.5)
    weight[:, 1] = weight[:, 0]
    factors = olora(weight, 4)
    identity = factors.lora_B.T @ factors.lora_B
    torch.testing.assert_close(identity, torch.eye(4), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_base_and_update_are_the_weight_again(dtype):
    before = power_law(70, 50, 0.5).to(dtype)
    for weight in (before.clone(), before.T.contiguous().T):
        factors = pissa([weight], 5, 2.0)[0]
        error = subtract_update_(weight, factors.lora_A, factors.lora_B, 2.0)
        update = 2.0 * factors.lora_B.double() @ factors.lora_A.double()
        torch.testing.assert_close(weight, (before - update).to(dtype), rtol=1e-2, atol=1e-6)
        missed = (weight.double() + update - before.double()).norm() / before.double().norm()
        assert missed < 4 * torch.finfo(dtype).eps
        assert error is None or error == pytest.approx(missed.item(), rel=1e-3)
        assert (error is None) is (dtype is torch.float32)


def test_a_weight_of_zeros_gets_an_update_of_zeros():
    for factors in (*pissa([torch.zeros(20, 10)], 4, 1.0), olora(torch.zeros(20, 10), 4)):
        assert factors.energy == 0
        assert not (factors.lora_B @ factors.lora_A).any()
    weight = torch.zeros(20, 10, dtype=torch.bfloat16)
    assert subtract_update_(weight, factors.lora_A, factors.lora_B, 1.0) == 0


@pytest.mark.parametrize("rank", [0, 11, 2.0, True])
def test_a_rank_that_the_weight_does_not_have(rank):
    for method in (olora, lambda weight, rank: pissa([weight], rank, 1.0)):
        with pytest.raises(ValueError, match=r"rank: expected 1 to 10, .* of \[20, 10\], got "):
            method(torch.zeros(20, 10), rank)


@pytest.mark.parametrize("scaling", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scaling_that_cannot_be_split(scaling):
    with pytest.raises(ValueError, match="scaling: expected a number of 1e-18 to 1e\\+18, got"):
        pissa([torch.ones(20, 10)], 2, scaling)


def test_a_weight_that_is_not_finite():
    with pytest.raises(ValueError, match="NaN or Inf"):
        pissa([torch.full((20, 10), float("nan"))], 2, 1.0)
    with pytest.raises(ValueError, match="weight: expected finite values, got NaN or Inf"):
        olora(torch.full((20, 10), float("nan")), 2)
