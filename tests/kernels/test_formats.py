"""Every 4-bit format on the Triton kernels under the interpreter, held to what NF4 is held to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from block_weights import ALL, assert_same_values, numpy_values, random_weight_of
from dora_cases import NormCase, check_norms
from gpu_cases import (
    check_finite,
    check_ops_against_reference,
    every_scale_weight,
    format_operands,
    in_format,
)
from grids import thinned
from grouped_cases import check, grouped_operands
from interpreted import INSIDE_TENSORS
from linear_cases import BF16, F16, F32
from nf4_weights import DTYPES

import peftkern
from peftkern.backends import ops
from peftkern.formats.block_weight import NAMES as BLOCKS
from peftkern.kernels.configs import nf4_fused_rows

pytestmark = INSIDE_TENSORS

FUSED_ROWS = nf4_fused_rows("interpreter", 1, 4, "")  # of results as narrow as those here
OTHERS = [name for name in ALL if name != "nf4"]  # whose tests are those of each kernel
NAN = float("nan")


# Values


@pytest.mark.parametrize(("name", "dtype"), thinned(OTHERS, DTYPES))
def test_every_code_and_every_scale(name, dtype):
    w = every_scale_weight(name, dtype)
    assert_same_values(peftkern.dequantize_nf4(w), numpy_values(w, dtype))


@pytest.mark.parametrize(
    ("name", "shape", "blocksize"),
    [
        ("fp4", (7, 13), 32),  # an odd size, and blocks that cross rows
        ("fp4", (3, 256), 256),
        ("mxfp4", (3, 5, 32), 32),
        ("nvfp4", (5, 48), 16),
        ("int4", (3, 96), 32),
        ("int4", (3, 512), 256),
    ],
)
def test_any_shape(name, shape, blocksize):
    w = random_weight_of(name, shape, BF16, blocksize)
    assert_same_values(peftkern.dequantize_nf4(w), numpy_values(w, BF16))


@pytest.mark.parametrize("name", BLOCKS)
def test_rows_that_cut_a_block_are_refused(name):
    w = random_weight_of(name, (2, 64))
    layout, x = [*w.layout[:3], 4, 24], torch.zeros(1, 24)
    with pytest.raises(ValueError, match=f"shape: expected rows of a multiple of .* in {name}"):
        ops.nf4_dequantize(w.tensors, layout, F32)
    with pytest.raises(ValueError, match=f"shape: expected rows of a multiple of .* in {name}"):
        ops.nf4_lora_linear_forward(x, w.tensors, layout, None, None, None, 1.0, None, 0.0)


# Products and gradients


@pytest.mark.parametrize(
    ("name", "dtypes", "shape"),
    thinned(OTHERS, [(BF16, F32), (F32, F32), (F16, F32)], [(5, 33, 128, 4), (9, 40, 96, 3)]),
)
def test_few_rows(name, dtypes, shape):
    """Fused; of NVFP4 a tile has several blocks, as many as divide its rows."""
    assert shape[0] <= FUSED_ROWS
    check_ops_against_reference([format_operands(name, shape, *dtypes)])


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *((name, (FUSED_ROWS + 1, 12, 64, 3)) for name in OTHERS),
        ("nvfp4", (3, 20, 48, 2)),  # rows of three blocks, which no tile divides
    ],
)
def test_composed(name, shape):
    """Decoded into scratch, then as over a dense weight."""
    check_ops_against_reference([format_operands(name, shape, BF16, BF16)])


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [("mxfp4", "scale", 255), ("nvfp4", "scale", 127), ("int4", "zero", NAN)],
)
def test_nan_of_a_scale_or_a_zero_propagates(name, field, value):
    o = format_operands(name, (3, 20, 64, 2), BF16, F32)
    getattr(o.w, field)[5] = value
    o = replace(o, weight=numpy_values(o.w, BF16))
    assert not check_finite(o)["y"].isfinite().all()


# Experts


@pytest.mark.parametrize(
    ("name", "transposed", "dtype"), thinned(OTHERS, [False, True], [BF16, F32])
)
def test_experts(name, transposed, dtype):
    o = grouped_operands(dtype, F32, N=32, K=32, sizes=(2, 0, 5), transposed=transposed)
    check(in_format(o, name))


# Norms


@pytest.mark.parametrize(("name", "dtype"), thinned(OTHERS, [BF16, F32]))
def test_norms(name, dtype):
    w = random_weight_of(name, (18, 96), dtype)
    check_norms([NormCase(w, torch.randn(5, 96), torch.randn(18, 5))])
