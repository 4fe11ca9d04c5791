"""Quantizers of every format: bit for bit the reference implementations, and nearest codes."""

from __future__ import annotations

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from block_weights import assert_same_values, numpy_values
from hypothesis import given
from hypothesis import strategies as st
from nf4_weights import DTYPES, assert_same_bits, assert_same_numbers
from paths import GOLDEN
from safetensors.torch import load_file
from torch import Tensor

import peftkern
from peftkern.formats.block_weight import BlockWeight
from peftkern.formats.table import FORMATS

GOLDEN_NAMES = ("weight", "bf16", "ties", "wide")


def codes_of(w: BlockWeight) -> Tensor:
    return torch.stack((w.packed & 15, w.packed >> 4), dim=1).view(w.shape)


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_mxfp4_and_nvfp4_are_bit_for_bit_those_of_torchao(name):
    golden = load_file(GOLDEN / "block_formats.safetensors")
    x = golden[name]
    for w in (peftkern.quantize_mxfp4(x), peftkern.quantize_nvfp4(x)):
        theirs = {part: golden[f"{name}.{w.format}.{part}"] for part in ("packed", "scale")}
        assert_same_bits(w.packed, theirs["packed"].view(-1))
        assert_same_bits(w.scale, theirs["scale"].view(-1))
        assert_same_values(peftkern.dequantize(w), golden[f"{name}.{w.format}.values"])
    assert_same_bits(w.tensor_scale, golden[f"{name}.nvfp4.tensor_scale"].view(1))


@pytest.mark.parametrize("name", [name for name in GOLDEN_NAMES if name != "bf16"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_int4_is_bit_for_bit_that_of_torchao(name, symmetric):
    golden = load_file(GOLDEN / "block_formats.safetensors")
    w = peftkern.quantize_int4(golden[name], blocksize=32, symmetric=symmetric)
    kind = f"{name}.int4{'_symmetric' if symmetric else ''}"
    assert_same_bits(codes_of(w), golden[f"{kind}.codes"])
    assert_same_bits(w.scale, golden[f"{kind}.scale"].view(-1))
    assert torch.equal(w.zero, golden[f"{kind}.zero"].view(-1).float())
    assert_same_values(peftkern.dequantize(w) + 0.0, golden[f"{kind}.values"] + 0.0)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fp4_is_bit_for_bit_that_of_bitsandbytes(dtype, double_quant):
    """Of whole blocks: it divides a cut one by its absmax, where all else multiplies."""
    weight = torch.randn(48, 128).to(dtype)
    weight[0, :64] = 0.0
    weight[1, ::5] = -0.0
    w = peftkern.quantize_fp4(weight, double_quant=double_quant)
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="fp4", blocksize=64)
    assert_same_bits(w.packed, packed.view(-1))
    if not double_quant:
        assert_same_bits(w.absmax, state.absmax)
        theirs = bnb.functional.dequantize_4bit(packed, state)
        assert_same_numbers(peftkern.dequantize(w), theirs)
    assert w.quant_type == "fp4" and w.nested == double_quant and w.dtype is dtype


def test_fp4_takes_the_nearest_value_of_an_odd_weight():
    weight = torch.randn(7, 13)
    w = peftkern.quantize_fp4(weight, blocksize=32, double_quant=False)
    assert w.packed[-1] & 15 == 0  # the pad
    scale = w.absmax.repeat_interleave(32)[:91].view(7, 13)
    values = torch.tensor(FORMATS[1].code)[:, None, None] * scale
    nearest = (values - weight).abs().amin(0)
    torch.testing.assert_close((peftkern.dequantize(w) - weight).abs(), nearest, rtol=0, atol=1e-6)


@given(
    st.sampled_from(["mxfp4", "nvfp4", "int4"]),
    st.lists(st.integers(0, 3), max_size=2),
    st.integers(0, 3),
    st.integers(-30, 30),
    st.sampled_from(DTYPES),
    st.integers(0, 2**32 - 1),
)
def test_codes_are_the_nearest(name, lead, blocks, exponent, dtype, seed):
    torch.manual_seed(seed)
    size = {"mxfp4": 32, "nvfp4": 16, "int4": 64}[name]
    weight = torch.ldexp(torch.randn(*lead, blocks * size), torch.tensor(exponent)).to(dtype)
    options = {"blocksize": 64} if name == "int4" else {}
    w = getattr(peftkern, f"quantize_{name}")(weight, **options)
    assert w.shape == weight.shape and w.dtype is dtype and w.blocksize == size
    got = peftkern.dequantize(w, torch.float32)
    assert_same_values(got, numpy_values(w, torch.float32))
    candidates = []
    for code in range(16):
        packed = torch.full_like(w.packed, code * 17)
        other = BlockWeight(
            name, packed, w.scale, w.shape, dtype, size, tensor_scale=w.tensor_scale, zero=w.zero
        )
        candidates.append(peftkern.dequantize(other, torch.float32))
    if weight.numel():
        errors = (torch.stack(candidates) - weight.float()).abs()
        least, scale = errors.amin(0), errors.amax()
        assert ((got - weight.float()).abs() <= least + 1e-6 * scale).all()


def test_ties_of_e2m1_go_to_the_even_code():
    """Halfway between neighbors, and next to it, on both sides of zero."""
    values = np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    middles = (values[:-1] + values[1:]) / 2
    expected = np.where(np.arange(7) % 2, np.arange(7) + 1, np.arange(7))
    for sign in (1, -1):
        for direction, codes in ((0, expected), (-9, np.arange(7)), (9, np.arange(1, 8))):
            x = np.nextafter(middles, np.float32(direction)) if direction else middles
            block = torch.zeros(1, 32)
            block[0, :7], block[0, 7] = torch.from_numpy(sign * x), 6.0
            got = codes_of(peftkern.quantize_mxfp4(block))[0, :7]
            assert (got & 7).tolist() == codes.tolist()
            assert ((got >> 3) == (sign < 0)).all()


def test_nan_inf_and_zeros():
    block = torch.randn(5, 32)
    block[0, 3], block[1, 4], block[2, 5] = float("nan"), float("inf"), -float("inf")
    block[3] = 0.0
    w = peftkern.quantize_mxfp4(block)
    values = peftkern.dequantize(w)
    assert w.scale.tolist()[:4] == [255, 255, 255, 0]
    assert values[:3].isnan().all() and (values[3] == 0).all() and values[4].isfinite().all()
    zeros = peftkern.quantize_nvfp4(torch.zeros(2, 32))
    assert zeros.tensor_scale.tolist() == [1.0] and (peftkern.dequantize(zeros) == 0).all()
    values = peftkern.dequantize(peftkern.quantize_nvfp4(block[:1], tensor_scale=torch.ones(1)))
    assert values[0, :16].isnan().all() and values[0, 16:].isfinite().all()
    assert (peftkern.dequantize(peftkern.quantize_int4(block[3:4], blocksize=32)) == 0).all()


def test_arguments_are_refused_by_name():
    weight = torch.randn(2, 64)
    for call, text in (
        (lambda: peftkern.quantize_mxfp4(torch.randn(2, 48)), "weight: expected .*multiple of 32"),
        (lambda: peftkern.quantize_mxfp4(torch.tensor(1.0)), "weight: expected"),
        (lambda: peftkern.quantize_mxfp4(weight.double()), "weight: expected a tensor of one of"),
        (lambda: peftkern.quantize_nvfp4(weight, tensor_scale=torch.ones(2)), "tensor_scale: "),
        (lambda: peftkern.quantize_nvfp4(weight, tensor_scale=0.5), "tensor_scale: expected one"),
        (lambda: peftkern.quantize_int4(weight, blocksize=16), r"blocksize: expected one of \(32"),
        (lambda: peftkern.quantize_int4(weight), "weight: expected .*multiple of 128"),
        (lambda: peftkern.quantize_int4(weight, blocksize=64, symmetric=1), "symmetric: expected"),
        (lambda: peftkern.quantize_fp4(weight, blocksize=48), "blocksize: expected one of"),
        (lambda: peftkern.dequantize(weight), "w: expected an NF4Weight or BlockWeight"),
    ):
        with pytest.raises(ValueError, match="^" + text):
            call()
