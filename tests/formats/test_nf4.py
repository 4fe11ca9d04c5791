"""The NF4 codec: bit for bit what bitsandbytes quantizes and rebuilds, on every back end."""

from __future__ import annotations

import json

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from bitsandbytes.functional import create_dynamic_map, get_4bit_type
from cuda_cases import check_extreme_absmax
from grids import thinned
from nf4_weights import (
    DTYPES,
    assert_same_bits,
    assert_same_every_time,
    bitsandbytes_state,
    codes_of,
    every_byte_weight,
    numpy_dequantize,
    random_weight,
)
from paths import GOLDEN as FOLDER
from safetensors import safe_open
from safetensors.torch import load_file
from tolerances import (
    ABSMAX_CODE_MISMATCH,
    DYNAMIC_MAP_RTOL,
    NF4_MAX_HALF_GAP,
    NF4_TIE_RTOL,
)

import peftkern
from peftkern.formats.nf4 import (
    BLOCKSIZES,
    NF4_CODE,
    NF4Weight,
    dynamic_map,
    nf4_code,
    nf4_midpoints,
)

GOLDEN = FOLDER / "nf4.safetensors"
ODD_SHAPES = [
    (), (0,), (0, 7), (1,), (2,), (3, 5), (7, 13), (1, 31), (10, 96), (33, 63), (127, 257),
    (2, 3, 5), (4095,), (4097,), (5, 8192), (3, 1031),
]  # fmt: skip


def assert_is_the_dynamic_map(theirs):
    """Of bitsandbytes; `test_tables_match_golden_bit_for_bit` has every bit of ours."""
    ours = torch.tensor(dynamic_map())
    torch.testing.assert_close(theirs, ours, rtol=DYNAMIC_MAP_RTOL, atol=0)


def test_tables_are_those_of_bitsandbytes():
    assert_same_bits(nf4_code(), get_4bit_type("nf4", device="cpu"))
    assert_is_the_dynamic_map(create_dynamic_map())


def test_tables_match_golden_bit_for_bit():
    golden = load_file(GOLDEN)
    assert_same_bits(nf4_code(), golden["code"])
    assert_same_bits(torch.tensor(dynamic_map()), golden["dynamic_map"])


def test_midpoints_are_float32_and_lie_between_neighbours():
    code = np.array(NF4_CODE, dtype=np.float32)
    middle = (code[:-1] + code[1:]) / np.float32(2)
    assert middle.dtype == np.float32
    assert np.array_equal(np.array(nf4_midpoints(), dtype=np.float64), middle.astype(np.float64))


@pytest.mark.parametrize(
    ("blocksize", "dtype", "nested"), thinned(BLOCKSIZES, DTYPES, [False, True], diagonals=2)
)
def test_dequantize_every_byte_matches_bitsandbytes(every_backend, blocksize, dtype, nested):
    w = every_byte_weight(blocksize, nested, dtype)
    # For large blocks bitsandbytes uses a function that it compiles: seconds per shape.
    with torch.compiler.set_stance("force_eager"):
        expected = bnb.functional.dequantize_4bit(w.packed.view(-1, 1), bitsandbytes_state(w))
    assert_same_bits(peftkern.dequantize_nf4(w), expected)
    out = torch.empty(w.shape, dtype=dtype)
    assert peftkern.dequantize_nf4(w, out=out) is out
    assert_same_bits(out, expected)


@pytest.mark.parametrize(("shape", "nested"), thinned(ODD_SHAPES, [False, True]))
def test_dequantize_any_shape_matches_the_definition(every_backend, shape, nested):
    w = peftkern.quantize_nf4(random_weight(shape), double_quant=nested)
    for dtype in DTYPES:
        assert_same_bits(peftkern.dequantize_nf4(w, dtype), numpy_dequantize(w, dtype))


def test_dequantize_defaults_to_the_original_dtype(backend):
    for dtype in DTYPES:
        w = peftkern.quantize_nf4(random_weight((3, 64), dtype))
        assert w.dtype == dtype
        assert peftkern.dequantize_nf4(w).dtype == dtype


@pytest.mark.parametrize(
    ("value", "dtype"),
    thinned([float("nan"), float("inf"), -float("inf"), 1e-40, 3e38], DTYPES, diagonals=2),
)
def test_dequantize_extreme_absmax_matches_the_definition(every_backend, dtype, value):
    check_extreme_absmax(value, dtype)


def test_dequantize_into_a_slice_leaves_its_neighbours(every_backend):
    w = peftkern.quantize_nf4(random_weight((5, 77)))
    flat = torch.full((5 * 77 + 2,), 42.0)
    out = flat[1:-1].view(5, 77)
    peftkern.dequantize_nf4(w, torch.float32, out=out)
    assert_same_bits(out, numpy_dequantize(w, torch.float32))
    assert flat[0] == 42.0 and flat[-1] == 42.0


def test_dequantize_into_a_strided_out(backend):
    w = peftkern.quantize_nf4(random_weight((5, 77)))
    memory = torch.full((77, 10), 42.0)
    out = memory.t()[::2]
    assert peftkern.dequantize_nf4(w, out=out) is out
    assert_same_bits(out, numpy_dequantize(w, torch.float32))
    assert (memory.t()[1::2] == 42.0).all()


def test_dequantize_into_out_is_seen_by_autograd(backend):
    w = peftkern.quantize_nf4(torch.randn(8, 8))
    x = torch.ones(8, 8, requires_grad=True)
    saved = x * 1
    loss = (saved * saved).sum()
    with pytest.raises(ValueError, match=r"out: .*outside of autograd"):
        peftkern.dequantize_nf4(w, out=saved)
    peftkern.dequantize_nf4(w, out=saved.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    "out", [torch.zeros(5, 76), torch.zeros(77, 5), torch.zeros(5, 77, dtype=torch.int32)]
)
def test_dequantize_refuses_an_out_that_does_not_fit(backend, out):
    w = peftkern.quantize_nf4(random_weight((5, 77)))
    with pytest.raises(ValueError, match=r"^out: expected"):
        peftkern.dequantize_nf4(w, out=out)
    with pytest.raises(ValueError, match=r"^out: expected"):
        peftkern.dequantize_nf4(w, torch.bfloat16, out=torch.zeros(5, 77))


def test_dequantize_is_deterministic(backend):
    w = peftkern.quantize_nf4(random_weight((257, 1023), torch.bfloat16))
    assert_same_every_time(lambda: [peftkern.dequantize_nf4(w)])


@pytest.mark.parametrize(("blocksize", "dtype"), thinned(BLOCKSIZES, DTYPES))
def test_quantize_matches_bitsandbytes(every_backend, blocksize, dtype):
    weight = random_weight((24, 4096), dtype)
    packed, state = bnb.functional.quantize_4bit(weight, blocksize=blocksize, quant_type="nf4")
    w = peftkern.quantize_nf4(weight, blocksize=blocksize, double_quant=False)
    assert_same_bits(w.absmax, state.absmax)
    assert_same_bits(w.packed, packed.view(-1))


@pytest.mark.parametrize("shape", [shape for shape in ODD_SHAPES if shape], ids=str)
def test_quantize_any_shape_matches_bitsandbytes_but_for_ties_in_the_tail(backend, shape):
    """bitsandbytes divides in a partial last block, where full blocks multiply by a reciprocal."""
    weight = random_weight(shape)
    w = peftkern.quantize_nf4(weight, blocksize=64, double_quant=False)
    if weight.numel() == 0:
        assert w.packed.numel() == 0 and w.absmax.numel() == 0
        return
    packed, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert_same_bits(w.absmax, state.absmax)
    expected = NF4Weight(packed, state.absmax, tuple(shape), 64, torch.float32)
    differ = np.flatnonzero(codes_of(w) != codes_of(expected))
    assert all(i >= weight.numel() // 64 * 64 for i in differ)
    scaled = weight.view(-1).double()[differ] / state.absmax.double()[-1]
    for value in scaled.tolist():
        assert min(abs(value - middle) for middle in nf4_midpoints()) < NF4_TIE_RTOL


@pytest.mark.parametrize(("shape", "dtype"), thinned(ODD_SHAPES, DTYPES))
def test_quantize_takes_the_nearest_code(every_backend, shape, dtype):
    """By brute force in NumPy: count the thresholds below x * (1 / absmax), all in float32."""
    weight = random_weight(shape, dtype)
    w = peftkern.quantize_nf4(weight, blocksize=32, double_quant=False)
    values = weight.float().numpy().reshape(-1)
    padded = np.pad(values, (0, -len(values) % 32)).reshape(-1, 32)
    absmax = np.abs(padded).max(axis=1, initial=0)
    assert np.array_equal(w.absmax.numpy(), absmax)
    scaled = padded * (np.float32(1) / np.maximum(absmax, np.float32(1e-38)))[:, None]
    thresholds = np.array(nf4_midpoints(), dtype=np.float32)
    codes = (scaled.reshape(-1)[: len(values), None] > thresholds).sum(axis=1)
    if len(codes) % 2:
        codes = np.append(codes, 7)
    assert np.array_equal(codes_of(w), codes)


def test_quantize_tie_takes_the_lower_code(every_backend):
    weight = torch.zeros(64)
    weight[0] = 1.0
    weight[1:16] = torch.tensor(nf4_midpoints())
    weight[16:31] = torch.nextafter(torch.tensor(nf4_midpoints()), torch.tensor(2.0))
    w = peftkern.quantize_nf4(weight, double_quant=False)
    assert codes_of(w)[1:16].tolist() == list(range(15))
    assert codes_of(w)[16:31].tolist() == list(range(1, 16))


def test_quantize_of_zeros_is_code_seven_with_absmax_zero(every_backend):
    w = peftkern.quantize_nf4(torch.zeros(3, 67), double_quant=False)
    assert (w.packed == 0x77).all()
    assert_same_bits(w.absmax, torch.zeros(4))
    assert_same_bits(peftkern.dequantize_nf4(w), torch.zeros(3, 67))


@pytest.mark.parametrize("value", [1e-38, 2e-39, 1e-45, 3e38])
def test_quantize_extreme_scale_matches_bitsandbytes(every_backend, value):
    weight = torch.linspace(-1, 1, 128).mul_(value)
    packed, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    w = peftkern.quantize_nf4(weight, double_quant=False)
    assert_same_bits(w.absmax, state.absmax)
    assert_same_bits(w.packed, packed.view(-1))


@pytest.mark.parametrize(
    ("value", "dtype"), thinned([float("nan"), float("inf"), -float("inf")], DTYPES)
)
def test_quantize_not_finite_matches_bitsandbytes(every_backend, value, dtype):
    """A NaN or an infinity spoils its own block, as in bitsandbytes, and no other."""
    weight = random_weight((4, 64), dtype)
    weight[1, 5] = value
    weight[2, 63] = value
    packed, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    w = peftkern.quantize_nf4(weight, double_quant=False)
    assert torch.equal(w.absmax.nan_to_num(nan=-1.0), state.absmax.nan_to_num(nan=-1.0))
    assert_same_bits(w.packed, packed.view(-1))
    rebuilt = peftkern.dequantize_nf4(w)
    assert not rebuilt[1].isfinite().any() or not torch.tensor(value).isnan()
    assert rebuilt[0].isfinite().all() and rebuilt[3].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantize_error_is_within_half_a_gap(backend, dtype):
    weight = random_weight((64, 512), dtype)
    w = peftkern.quantize_nf4(weight, double_quant=False)
    error = (peftkern.dequantize_nf4(w, torch.float32) - weight.float()).abs().view(-1, 64)
    assert (error <= NF4_MAX_HALF_GAP * w.absmax[:, None]).all()


def test_quantize_reads_values_not_memory(backend):
    """Transposed, sliced, expanded and misaligned weights give what their copies give."""
    base = random_weight((130, 131))
    for view in (base.t(), base[1::2, 3:], base[:1].expand(9, 131), base.view(-1)[1:17000]):
        got = peftkern.quantize_nf4(view, double_quant=False)
        expected = peftkern.quantize_nf4(view.contiguous().clone(), double_quant=False)
        assert got.shape == tuple(view.shape)
        assert_same_bits(got.packed, expected.packed)
        assert_same_bits(got.absmax, expected.absmax)


def test_quantize_is_deterministic(backend):
    weight = random_weight((257, 1023), torch.bfloat16)
    assert_same_every_time(lambda: peftkern.quantize_nf4(weight).tensors)


@pytest.mark.parametrize("blocksize", [0, -64, 16, 48, 8192, 64.0, "64", None])
def test_quantize_refuses_a_blocksize(backend, blocksize):
    with pytest.raises(ValueError, match="blocksize"):
        peftkern.quantize_nf4(random_weight((4, 64)), blocksize=blocksize)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.complex64, torch.bool])
def test_quantize_refuses_a_dtype(backend, dtype):
    with pytest.raises(ValueError, match=r"^weight: expected .*float32.*, got"):
        peftkern.quantize_nf4(torch.zeros(4, 64, dtype=dtype))


@pytest.mark.parametrize("shape", [(1, 64), (300, 64), (257, 4096), (7, 13)], ids=str)
def test_double_quant_takes_the_nearest_absmax(backend, shape):
    weight = random_weight(shape)
    absmax = peftkern.quantize_nf4(weight, double_quant=False).absmax
    w = peftkern.quantize_nf4(weight)
    assert_same_bits(w.nested_offset, absmax.mean())
    centred = (absmax - absmax.mean()).numpy()
    padded = np.pad(centred, (0, -len(centred) % 256)).reshape(-1, 256)
    nested = np.abs(padded).max(axis=1)
    assert np.array_equal(w.nested_absmax.numpy(), nested)
    code = np.array(dynamic_map(), dtype=np.float32)
    thresholds = (code[:-1] + code[1:]) / np.float32(2)
    scaled = padded * (np.float32(1) / np.maximum(nested, np.float32(1e-38)))[:, None]
    q = (scaled.reshape(-1)[: len(centred), None] > thresholds).sum(axis=1)
    assert np.array_equal(w.absmax.numpy(), q)


def test_double_quant_is_bitsandbytes_but_for_its_binned_table(backend):
    weight = random_weight((1024, 1024), torch.bfloat16)
    packed, state = bnb.functional.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=True
    )
    w = peftkern.quantize_nf4(weight)
    assert_same_bits(w.packed, packed.view(-1))
    assert_same_bits(w.nested_absmax, state.state2.absmax)
    assert_is_the_dynamic_map(state.state2.code)
    assert_same_bits(w.nested_offset, state.offset)
    off = (w.absmax.int() - state.absmax.int()).abs()
    assert off.max() <= 1
    assert (off != 0).double().mean() < ABSMAX_CODE_MISMATCH


def golden_cases() -> list[tuple[int, dict]]:
    with safe_open(GOLDEN, "pt") as file:
        return list(enumerate(json.loads(file.metadata()["cases"])))


@pytest.mark.parametrize(("index", "case"), golden_cases(), ids=lambda value: str(value)[:60])
def test_golden_bitsandbytes_state_is_read_and_rebuilt(backend, index, case):
    golden = load_file(GOLDEN)
    w = NF4Weight.from_state_dict(golden, f"{index}.")
    assert list(w.shape) == case["shape"] and w.blocksize == case["blocksize"]
    assert w.nested == case["nested"]
    assert_same_bits(peftkern.dequantize_nf4(w), golden[f"{index}.dequantized"])
    ours = peftkern.quantize_nf4(golden[f"{index}.input"], blocksize=case["blocksize"])
    full = w.numel // w.blocksize * w.blocksize // 2
    assert_same_bits(ours.packed[:full], w.packed[:full])
    for key, value in w.state_dict(f"{index}.").items():
        assert_same_bits(value, golden[key])
