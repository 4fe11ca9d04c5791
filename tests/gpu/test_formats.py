"""Every 4-bit format on the compiled Triton kernels: exact values, products, experts, norms."""

from __future__ import annotations

import pytest
import torch
from block_weights import ALL, assert_same_values, numpy_values, random_weight_of
from dora_cases import NormCase, check_norms
from gpu_cases import (
    check_ops_against_reference,
    every_scale_weight,
    format_operands,
    in_format,
    on_device,
)
from gpu_runs import CUDA, NEEDS_GPU
from grouped_cases import check, grouped_operands
from linear_cases import BF16, F16, F32
from nf4_weights import DTYPES

import peftkern

pytestmark = [*NEEDS_GPU, pytest.mark.usefixtures("triton_serves")]

OTHERS = [name for name in ALL if name != "nf4"]  # whose tests are those of each kernel


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OTHERS)
def test_every_code_and_every_scale(name, dtype):
    w = every_scale_weight(name, dtype)
    with peftkern.use_backend("triton"):
        got = peftkern.dequantize(w.to(CUDA))
    assert_same_values(got.cpu(), numpy_values(w, dtype))


@pytest.mark.parametrize("dtypes", [(BF16, F32), (F16, F32), (F32, F32)], ids=str)
@pytest.mark.parametrize("M", [1, 16, 60, 300])
@pytest.mark.parametrize("name", OTHERS)
def test_products_and_gradients(name, M, dtypes):
    for K in (96, 320):
        o = format_operands(name, (M, 257, K, 16), *dtypes)
        check_ops_against_reference([on_device(o, CUDA)])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("name", OTHERS)
def test_experts(name, dtype, transposed):
    sizes = (0, 3, 170, 20)
    o = grouped_operands(dtype, F32, N=256, K=320, sizes=sizes, transposed=transposed)
    with peftkern.use_backend("triton"):
        check(on_device(in_format(o, name), CUDA))


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("name", OTHERS)
def test_norms(name, dtype):
    w = random_weight_of(name, (130, 320), dtype).to(CUDA)
    factors = torch.randn(16, 320, device=CUDA), torch.randn(130, 16, device=CUDA)
    with peftkern.use_backend("triton"):
        check_norms([NormCase(w, *factors)])
