"""Torch's own operations on a GPU: what serves where no kernel of ours does, or none is trusted."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import dense_cases, draw_seed, nf4_cases, run_ops
from gpu_runs import CUDA, NEEDS_GPU
from linear_cases import BF16, DTYPES, F16, F32, check_accuracy, ours
from nf4_weights import assert_same_bits, assert_same_every_time

import peftkern
from peftkern.backends.dropout import philox_keep

pytestmark = NEEDS_GPU

SHAPES = [(16, 129, 63, 8), (300, 512, 1024, 16), (4300, 1024, 2048, 64)]
CASES = [dense_cases, nf4_cases]


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cases", CASES)
def test_values_and_gradients(cases, shape, dtypes):
    drawn = cases(shape, *dtypes, device=CUDA)
    with peftkern.use_backend("torch"):
        check_accuracy(drawn, ours)


@pytest.mark.parametrize("dtypes", [(BF16, F32), (BF16, BF16), (F16, F16)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_seed_is_the_mask_that_it_stands_for(shape, dtypes):
    (o, *_) = dense_cases(shape, *dtypes, device=CUDA, dropout_p=0.3)
    seed = draw_seed(CUDA)
    with peftkern.use_backend("torch"):
        results = [run_ops(o, keep) for keep in (seed, philox_keep(seed, *o.x.shape, 0.3))]
        for got, wanted in zip(*(result.values() for result in results), strict=True):
            assert_same_bits(got, wanted)
        assert_same_every_time(lambda: run_ops(o, seed).values())


@pytest.mark.parametrize("shape", [(3, 1031), (1024, 8192)], ids=str)
def test_decoding_is_the_references_bit_for_bit(shape):
    w = peftkern.quantize_nf4(torch.randn(shape))
    for dtype in (F32, F16, BF16):
        with peftkern.use_backend("reference"):
            wanted = peftkern.dequantize_nf4(w, dtype)
        with peftkern.use_backend("torch"):
            assert_same_bits(peftkern.dequantize_nf4(w.to(CUDA), dtype).cpu(), wanted)
