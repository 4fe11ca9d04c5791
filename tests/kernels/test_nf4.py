"""The Triton kernels of the NF4 codec under the interpreter: bit for bit what the format says.

They reduce a block value by value there, so blocks are few, and the largest meet each extreme once.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cuda_cases import (
    assert_quantized_alike,
    check_extreme_absmax,
    check_extreme_blocks,
    check_ties,
)
from grids import thinned
from interpreted import INSIDE_TENSORS
from linear_cases import F32
from nf4_weights import DTYPES, assert_same_bits, every_byte_weight, numpy_dequantize, random_weight

import peftkern
from peftkern.formats.nf4 import BLOCKSIZES

pytestmark = INSIDE_TENSORS

NAN, INF = float("nan"), float("inf")
SHAPES = [(), (0,), (0, 7), (1,), (2,), (7, 13), (10, 96), (33, 63), (4097,), (3, 1031)]


@pytest.mark.parametrize(
    ("blocksize", "dtype", "double_quant"), thinned(BLOCKSIZES, DTYPES, [False, True], diagonals=2)
)
def test_dequantize_every_byte(blocksize, dtype, double_quant):
    w = every_byte_weight(blocksize, double_quant, dtype)
    if blocksize > 256:  # seconds otherwise; nested blocks end in the short ones
        values = 9 * blocksize - 17
        changed = {"packed": w.packed[: (values + 1) // 2], "absmax": w.absmax[:9]}
        if double_quant:
            changed["nested_absmax"] = w.nested_absmax[:1]
        w = replace(w, shape=(values,), **changed)
    assert_same_bits(peftkern.dequantize_nf4(w), numpy_dequantize(w, dtype))


@pytest.mark.parametrize(
    ("shape", "blocksize", "double_quant", "dtype"),
    thinned(SHAPES, [32, 64, 4096], [False, True], DTYPES),
)
def test_quantize_and_dequantize_any_shape(shape, blocksize, double_quant, dtype):
    dense = random_weight(shape, dtype)
    assert_quantized_alike(dense, blocksize)
    with peftkern.use_backend("reference"):
        w = peftkern.quantize_nf4(dense, blocksize=blocksize, double_quant=double_quant)
    for wanted in DTYPES:
        assert_same_bits(peftkern.dequantize_nf4(w, wanted), numpy_dequantize(w, wanted))


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_quantize_every_blocksize(blocksize):
    assert_quantized_alike(random_weight((2 * blocksize + 809,)), blocksize)


@pytest.mark.parametrize(
    ("value", "dtype", "blocksize"),
    thinned([NAN, INF, -INF, 0.0, -0.0, 3e38, 1e-40], DTYPES, [64, 4096]),
)
def test_quantize_extreme_blocks(value, dtype, blocksize):
    check_extreme_blocks(value, dtype, blocksizes=[blocksize])


def test_quantize_ties_take_the_lower_code():
    check_ties(F32)


@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e-40, 3e38])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize_extreme_absmax(dtype, value):
    check_extreme_absmax(value, dtype)


def test_dequantize_into_a_strided_and_a_misaligned_out():
    w = peftkern.quantize_nf4(random_weight((5, 77)), double_quant=False)
    memory = torch.full((77, 10), 42.0)
    flat = torch.full((5 * 77 + 2,), 42.0)
    for out in (memory.t()[::2], flat[1:-1].view(5, 77)):
        assert peftkern.dequantize_nf4(w, out=out) is out
        assert_same_bits(out, numpy_dequantize(w, F32))
    assert (memory.t()[1::2] == 42.0).all() and flat[0] == flat[-1] == 42.0
