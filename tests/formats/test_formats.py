"""Every 4-bit format: each code beside each scale byte, bit for bit what its definition says."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from bitsandbytes.functional import get_4bit_type
from block_weights import (
    ALL,
    assert_same_values,
    e2m1,
    e4m3,
    every_pair_weight,
    numpy_values,
    random_weight_of,
)
from hypothesis import given
from hypothesis import strategies as st
from nf4_weights import DTYPES, assert_same_bits, assert_same_numbers, every_byte_weight

import peftkern
from peftkern.backends import ops, pointers, reference
from peftkern.backends.programs import PLAIN
from peftkern.formats.block_weight import NAMES, BlockWeight
from peftkern.formats.nf4 import NF4Weight
from peftkern.formats.table import E2M1_CODE, FORMATS, FP4, NUMBERS, code_of, cut, fields

SERVED = (None, *PLAIN)  # what serves by itself, and torch's own operations


def test_codes_are_those_of_the_definitions():
    assert_same_bits(code_of(FP4), get_4bit_type("fp4", device="cpu"))
    assert [math.copysign(1, v) * (abs(v) + 1) for v in E2M1_CODE] == [
        math.copysign(1, e2m1(code)) * (abs(e2m1(code)) + 1) for code in range(16)
    ]
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    theirs = every.view(torch.float8_e4m3fn).float()
    assert_same_values(torch.tensor([e4m3(byte) for byte in range(256)]), theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_code_beside_every_scale(every_backend, name, dtype):
    w = every_pair_weight(name, dtype)
    expected = numpy_values(w, dtype)
    assert expected.isnan().any() and not expected.isnan().all()
    out = torch.empty(2, *w.shape, dtype=dtype).transpose(0, 1)[:, 1]
    ops.nf4_dequantize_out(w.tensors, w.layout, out)
    assert_same_values(ops.nf4_dequantize(w.tensors, w.layout, dtype), expected)
    assert_same_values(out, expected)


@pytest.mark.parametrize("served", SERVED)
@pytest.mark.parametrize("nested", [False, True])
def test_every_byte_of_fp4_is_that_of_bitsandbytes(nested, served):
    import bitsandbytes as bnb
    from nf4_weights import bitsandbytes_state

    for dtype in DTYPES:
        w = every_byte_weight(64, nested, dtype, "fp4")
        theirs = bnb.functional.dequantize_4bit(w.packed.view(-1, 1), bitsandbytes_state(w))
        with peftkern.use_backend(served):
            got = ops.nf4_dequantize(w.tensors, w.layout, dtype)
        assert_same_bits(got, numpy_values(w, dtype))
        assert_same_numbers(got, theirs)


def test_edges_of_the_scales():
    """Subnormal, overflowing and NaN scales, and the sign of zero."""

    def values(name: str, scale: int, **options) -> torch.Tensor:
        codes = torch.arange(32) % 16
        packed = (codes[1::2] << 4 | codes[::2]).to(torch.uint8)
        blocksize = FORMATS[NUMBERS[name]].blocksizes[0]
        scales = torch.full((32 // blocksize,), scale, dtype=torch.uint8)
        w = BlockWeight(name, packed, scales, (32,), torch.float32, blocksize, **options)
        return peftkern.dequantize_nf4(w)

    assert values("mxfp4", 0)[1].item() == 2.0**-128 and values("mxfp4", 127)[7].item() == 6.0
    assert values("mxfp4", 254)[7].item() == math.inf and values("mxfp4", 254)[2].item() == 2.0**127
    assert values("mxfp4", 255).isnan().all() and values("nvfp4", 0x7F).isnan().all()
    assert values("nvfp4", 0xFF).isnan().all()
    assert values("nvfp4", 1)[7].item() == 6 * 2.0**-9
    for zero in (values("mxfp4", 3)[8], values("nvfp4", 5)[8], values("nvfp4", 0x80)[0]):
        assert zero.item() == 0 and torch.signbit(zero)
    scaled = values("nvfp4", 0x7E, tensor_scale=torch.tensor([3e38]))
    assert scaled[1].item() == math.inf and scaled[0].isnan()


@given(st.data())
def test_any_shape_of_every_format(data):
    name = data.draw(st.sampled_from(ALL))
    row = FORMATS[NUMBERS[name]]
    blocksize = data.draw(st.sampled_from(row.blocksizes))
    shape = tuple(data.draw(st.lists(st.integers(0, 7), max_size=2)))
    last = data.draw(st.integers(0, 300 if row.crosses_rows else 4))
    shape += (last if row.crosses_rows else last * blocksize,)
    torch.manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    dtype = data.draw(st.sampled_from(DTYPES))
    w = random_weight_of(name, shape, dtype, blocksize)
    assert w.tensors == w.tensors and len(w.tensors) == len(fields(w.layout))
    for (_, kind, length), tensor in zip(fields(w.layout), w.tensors, strict=True):
        assert tensor.dtype is kind and tensor.numel() == length
    for served in SERVED:
        with peftkern.use_backend(served):
            assert_same_values(
                ops.nf4_dequantize(w.tensors, w.layout, dtype), numpy_values(w, dtype)
            )


@pytest.mark.parametrize("name", ALL)
def test_blocks_that_are_cut_out_have_the_same_values(name):
    w = random_weight_of(name, (6, 64))
    plain = reference.unnested(w.tensors, w.layout)
    whole = numpy_values(w, torch.float32).view(-1)
    size = w.blocksize
    rows = reference.nf4_dequantize(
        *cut(*plain, slice(64 // size, 192 // size), (2, 64)), torch.float32
    )
    assert_same_values(rows.view(-1), whole[64:192])
    at = torch.tensor([5, 0, 3])
    some = reference.nf4_dequantize(*cut(*plain, at, (3, size)), torch.float32)
    assert_same_values(some, whole.view(-1, size)[at])


@pytest.mark.parametrize("name", ALL)
def test_addresses_of_every_tensor_reach_native_code(name):
    w = random_weight_of(name, (4, 64))
    view = pointers.weight(w.tensors, w.layout)
    form, numel, blocksize, _, _, packed, octets, scale, nblocks, aux, aux_len, *_ = view
    assert len(view) == 13 and (form, numel, blocksize) == (NUMBERS[name], 256, w.blocksize)
    assert (packed, octets) == (w.packed.data_ptr(), 128)
    assert (scale, nblocks) == (w.tensors[1].data_ptr(), 256 // w.blocksize)
    third = w.tensors[2] if len(w.tensors) > 2 else None
    expected = (0, 0) if third is None else (third.data_ptr(), third.numel())
    assert (aux, aux_len) == expected
    for index in range(len(w.tensors)):
        wrong = list(w.tensors)
        wrong[index] = wrong[index].new_zeros(wrong[index].numel() + 1)
        with pytest.raises(ValueError, match=rf"^{fields(w.layout)[index].name}: expected"):
            pointers.weight(wrong, w.layout)


@pytest.mark.parametrize("name", [name for name in ALL if name != "nf4"])
def test_a_back_end_that_does_not_decode_a_format_says_so(name):
    """It never takes the codes for NF4's."""
    from peftkern.backends.decoded import refusal_format

    w = random_weight_of(name, (4, 64))
    for backend in ("cuda", "cpu"):
        if refusal_format(backend, w.layout) is None:
            continue
        assert refusal_format(backend, w.layout) == f"no kernel decodes {name}"
        if backend != "cuda":
            text = f"back end {backend!r} cannot run nf4_dequantize: no kernel decodes {name}"
            with peftkern.use_backend(backend), pytest.raises(RuntimeError, match=re.escape(text)):
                ops.nf4_dequantize(w.tensors, w.layout, torch.float32)


def test_layouts_that_no_format_has():
    w = random_weight_of("nvfp4", (2, 32))
    for layout, text in (
        ((5, 16, 0, 2, 32), "layout: expected a format from 0 to 4"),
        ((3, 32, 0, 2, 32), "blocksize: expected one of (16,), got 32"),
        ((3, 16, 256, 2, 32), "nested_blocksize: expected one of (0,), got 256"),
        ((3, 16, 0, 4, 8), "shape: expected rows of a multiple of 16 values in nvfp4, got [4, 8]"),
        ((4, 32, 0, 2, 32), "scale: expected 2 contiguous torch.float32"),
        ((2, 32, 0, 2, 32), "w: expected 2 tensors, got 3"),
    ):
        with pytest.raises(ValueError, match="^" + re.escape(text)):
            pointers.weight(w.tensors, layout)
    for served in PLAIN:
        with (
            peftkern.use_backend(served),
            pytest.raises(ValueError, match="layout: expected a format"),
        ):
            ops.nf4_dequantize(w.tensors, (7, 16, 0, 2, 32), torch.float32)


@pytest.mark.parametrize("name", ALL)
def test_a_weight_moves_and_tells_its_size(name):
    w = random_weight_of(name, (4, 64), torch.bfloat16)
    assert w.to("cpu") is w and w.numel == 256 and w.nblocks == 256 // w.blocksize
    moved = w.to("meta")
    assert moved.device.type == "meta" and moved.layout == w.layout and moved.dtype is w.dtype
    assert w.nbytes == sum(tensor.nbytes for tensor in w.tensors)
    assert ("format='" + name if isinstance(w, BlockWeight) else "NF4Weight(") in repr(w)
    assert isinstance(w, BlockWeight | NF4Weight) and np.prod(w.shape) == w.numel


@pytest.mark.parametrize("served", SERVED)
def test_tensors_of_another_format_are_refused(served):
    mxfp4, int4 = (random_weight_of(name, (4, 64)) for name in ("mxfp4", "int4"))
    with peftkern.use_backend(served):
        for w, number, name in ((mxfp4, 0, "absmax"), (int4, 3, "scale")):
            layout = (number, 16 if number else 32, 0, *w.shape)
            with pytest.raises(ValueError, match=f"{name}: expected "):
                ops.nf4_dequantize(w.tensors, layout, torch.float32)
