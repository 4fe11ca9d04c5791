"""LoftQ and QPiSSA against loops over dense matrices with the exact SVD."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peftkern import quantize_nf4
from peftkern.functional import dequantize_nf4
from peftkern.methods.initialization.factors import pissa
from peftkern.methods.initialization.loftq import (
    Storage,
    loftq,
    qpissa,
    quantize_residual,
    relative_error,
)

PLAIN = Storage(double_quant=False)


def gaussian(m: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def exact_loop(weight: Tensor, rank: int, steps: int, storage: Storage) -> float:
    """The error of PEFT's loop, with its SVD of the whole residual."""
    update = torch.zeros_like(weight)
    options = {"blocksize": storage.blocksize, "double_quant": storage.double_quant}
    for _ in range(steps):
        base = dequantize_nf4(quantize_nf4(weight - update, **options))
        U, S, Vh = torch.linalg.svd(weight - base, full_matrices=False)
        update = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    return float((weight - base - update).norm() / weight.norm())


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("storage", [PLAIN, Storage(blocksize=128)])
@pytest.mark.parametrize("shape", [(96, 200), (640, 576)])
def test_loftq_is_as_close_as_the_exact_loop(shape, steps, storage):
    """The larger shape takes the iteration, the smaller one an exact SVD."""
    weight = gaussian(*shape)
    ((factors, base),) = loftq([weight], 16, 1.0, storage, steps=steps)
    error = relative_error(weight, base, factors, 1.0)
    assert error == pytest.approx(exact_loop(weight, 16, steps, storage), rel=5e-3)
    update = factors.lora_B @ factors.lora_A
    missed = (weight - dequantize_nf4(base, torch.float32) - update).norm() / weight.norm()
    assert error == pytest.approx(missed.item(), rel=1e-4)


def test_loftq_counts_the_scaling():
    """With alpha != r the update is the same: both factors are divided by sqrt(scaling)."""
    weight = gaussian(96, 200)
    plain = dequantize_nf4(quantize_nf4(weight, double_quant=False))
    nf4 = float((weight - plain).norm() / weight.norm())
    errors = []
    for scaling in (1.0, 2.0, 4.0, 0.25):
        ((factors, base),) = loftq([weight], 16, scaling, PLAIN, steps=2)
        errors.append(relative_error(weight, base, factors, scaling))
    assert errors == pytest.approx([errors[0]] * 4, rel=1e-4)
    assert errors[0] < 0.95 * nf4


def test_qpissa_quantizes_what_pissa_leaves():
    weight = gaussian(96, 200)
    ((factors, base),) = qpissa([weight], 16, 2.0, PLAIN)
    (alone,) = pissa([weight], 16, 2.0)
    torch.testing.assert_close(factors.lora_A, alone.lora_A)
    residual = weight - 2.0 * alone.lora_B @ alone.lora_A
    expected = dequantize_nf4(quantize_nf4(residual, double_quant=False))
    same = dequantize_nf4(base) == expected
    assert same.float().mean() > 0.999  # a residual between two codes may round to either
    assert relative_error(weight, base, factors, 2.0) < 0.09


@pytest.mark.parametrize("shape", [(64, 64), (33, 37), (7, 129), (200, 96), (1, 5)])
@pytest.mark.parametrize("storage", [PLAIN, Storage(), Storage(blocksize=32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_panels_quantize_as_the_whole_does(monkeypatch, shape, storage, dtype):
    monkeypatch.setattr("peftkern.functional.panels._ON_CPU", 256)
    monkeypatch.setattr("peftkern.functional.panels._LEAST", 1)
    weight = gaussian(*shape).to(dtype)
    options = {"blocksize": storage.blocksize, "double_quant": storage.double_quant}
    base = quantize_residual(weight, None, 1.0, storage)
    whole = quantize_nf4(weight, **options)
    assert all(torch.equal(a, b) for a, b in zip(base.tensors, whole.tensors, strict=True))
    assert base.layout == whole.layout and base.dtype is dtype
    # An NF4 weight is read by panels that begin with its blocks.
    again = quantize_residual(whole, None, 1.0, PLAIN)
    dense = quantize_nf4(dequantize_nf4(whole, torch.float32), double_quant=False)
    assert torch.equal(again.packed, dense.packed) and torch.equal(again.absmax, dense.absmax)


@pytest.mark.parametrize("steps", [0, -1, 1.5, True])
def test_steps_that_are_none(steps):
    with pytest.raises(ValueError, match="steps: expected an integer of at least 1, got"):
        loftq([gaussian(20, 10)], 2, 1.0, PLAIN, steps=steps)
