"""NF4 on the CUDA kernels, compiled for this CPU: bit for bit what the format says."""

from __future__ import annotations

import math
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from cuda_cases import (
    assert_equal_but_for_payloads,
    assert_quantized_alike,
    check_extreme_absmax,
    check_extreme_blocks,
    check_refusals,
    check_ties,
    scheduled,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nf4_strategies import weights
from nf4_weights import (
    DTYPES,
    assert_same_bits,
    every_byte_weight,
    numpy_dequantize,
    random_weight,
)
from torch import Tensor

import peftkern
from peftkern.backends import dispatch, ops, pointers
from peftkern.backends.cuda import module as cuda
from peftkern.backends.cuda import nf4
from peftkern.formats.nf4 import BLOCKSIZES
from peftkern.formats.table import FORMATS

F32 = torch.float32
# The fixture is the same for every example.
drawn = settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])


pytestmark = pytest.mark.usefixtures("served_by_cuda")


# Dequantize


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_dequantize_every_byte(blocksize, dtype, double_quant):
    w = every_byte_weight(blocksize, double_quant, dtype)
    assert_same_bits(peftkern.dequantize_nf4(w), numpy_dequantize(w, dtype))
    assert peftkern.stats().calls == {("nf4_dequantize", "cuda"): 1}


@pytest.mark.parametrize("double_quant", [False, True])
def test_fp4_differs_in_its_table_alone(double_quant):
    w = every_byte_weight(64, double_quant, torch.bfloat16, "fp4")
    assert_same_bits(peftkern.dequantize_nf4(w), numpy_dequantize(w, torch.bfloat16))
    assert peftkern.stats().calls == {("nf4_dequantize", "cuda"): 1}


@drawn
@given(weights(), st.sampled_from(DTYPES), st.integers(0, 3))
def test_dequantize_any_weight(w, dtype, offset):
    """Into memory that begins at any element, whose neighbours stay as they were."""
    memory = torch.full((w.numel + 16,), 42.0, dtype=dtype)
    out = memory[offset : offset + w.numel].view(w.shape)
    assert peftkern.dequantize_nf4(w, out=out) is out
    assert_equal_but_for_payloads(out, numpy_dequantize(w, dtype))
    assert (memory[:offset] == 42.0).all() and (memory[offset + w.numel :] == 42.0).all()
    assert_equal_but_for_payloads(peftkern.dequantize_nf4(w, dtype), numpy_dequantize(w, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize_misaligned_codes(dtype):
    w = every_byte_weight(64, True, dtype)
    for start in (1, 2, 3):
        memory = torch.cat((w.packed.new_zeros(start), w.packed))
        moved = replace(w, packed=memory[start:])
        assert_same_bits(peftkern.dequantize_nf4(moved), numpy_dequantize(w, dtype))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e-40, 3e38])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize_extreme_absmax(dtype, value):
    check_extreme_absmax(value, dtype)


def test_dequantize_into_a_strided_out():
    w = every_byte_weight(32, True, F32)
    memory = torch.full((w.shape[1], 2 * w.shape[0]), 42.0)
    out = memory.t()[::2]
    assert peftkern.dequantize_nf4(w, out=out) is out
    assert_same_bits(out, numpy_dequantize(w, F32))
    assert (memory.t()[1::2] == 42.0).all()


# Quantize


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_quantize_every_blocksize(blocksize, dtype):
    for numel in (1, blocksize - 1, blocksize, blocksize + 1, 9001):
        assert_quantized_alike(random_weight((numel,), dtype), blocksize)


@drawn
@given(
    st.lists(st.integers(0, 40), max_size=3).map(tuple),
    st.sampled_from(BLOCKSIZES),
    st.sampled_from(DTYPES),
    st.integers(-30, 30),
    st.integers(0, 3),
    st.integers(0, 2**32 - 1),
)
def test_quantize_any_weight(shape, blocksize, dtype, exponent, offset, seed):
    torch.manual_seed(seed)
    numel = math.prod(shape)
    dense = (torch.randn(numel + offset) * 2.0**exponent).to(dtype)[offset:].view(shape)
    assert_quantized_alike(dense, blocksize)
    assert_quantized_alike(dense.transpose(0, -1) if dense.dim() > 1 else dense, blocksize)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "value", [math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40, 3e38]
)
def test_quantize_extreme_blocks(value, dtype):
    check_extreme_blocks(value, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantize_ties_take_the_lower_code(dtype):
    check_ties(dtype)


# Both


@pytest.mark.parametrize("schedule", [1, 2, 3])
def test_no_order_of_threads_changes_a_bit(emulated_cuda, schedule):
    w, dense = every_byte_weight(64, True, torch.bfloat16), random_weight((70, 64))
    wanted = peftkern.dequantize_nf4(w), *ops.nf4_quantize(dense, 64)
    with scheduled(emulated_cuda, schedule):
        got = peftkern.dequantize_nf4(w), *ops.nf4_quantize(dense, 64)
    assert_same_bits(got, wanted)


@pytest.mark.parametrize("shape", [(0,), (0, 7), (3, 0, 2)], ids=str)
def test_empty(shape):
    dense = torch.zeros(shape)
    packed, absmax = ops.nf4_quantize(dense, 64)
    assert packed.shape == absmax.shape == (0,)
    with peftkern.use_backend("reference"):
        w = peftkern.quantize_nf4(dense)
    assert peftkern.dequantize_nf4(w, F32).shape == shape


# Wrong arguments: refused in Python by name, and once more in C++


def test_weight_that_does_not_fit_is_refused_by_name():
    w, out = every_byte_weight(64, True, F32), torch.zeros(300, 64)
    names = ("packed", "absmax", "nested_absmax", "nested_code", "nested_offset")
    good = dict(zip(names, w.tensors, strict=True))

    def dequantize(
        out: Tensor, blocksize: int = 64, nested_blocksize: int = 256, **changes
    ) -> None:
        layout = [0, blocksize, nested_blocksize, *w.shape]
        nf4.nf4_dequantize_out(list((good | changes).values()), layout, out)

    dequantize(out)
    changes = {
        "packed": w.packed[:-1],
        "absmax": w.absmax.float(),
        "nested_absmax": w.nested_absmax.repeat(2)[::2],
        "nested_code": w.nested_code[:255],
        "nested_offset": w.nested_offset.double(),
        "blocksize": 48,
        "nested_blocksize": 48,
    }
    for name, value in changes.items():
        with pytest.raises(ValueError, match=rf"^{name}: expected .* got "):
            dequantize(out, **{name: value})
    for wrong in (out.double(), torch.zeros(300, 64, device="meta")):
        with pytest.raises(ValueError, match=r"^(out|packed): expected"):
            dequantize(wrong)


def test_dense_weight_that_does_not_fit_is_refused_by_name():
    for wrong, blocksize, name in (
        (torch.zeros(4, dtype=torch.float64), 64, "weight"),
        (torch.zeros(4), 65, "blocksize"),
    ):
        with pytest.raises(ValueError, match=rf"^{name}: expected .* got "):
            nf4.nf4_quantize(wrong, blocksize)


def test_library_checks_sizes_itself(emulated_cuda):
    w, out = every_byte_weight(64, True, F32), torch.zeros(300, 64)
    good = list(pointers.weight(w.tensors, w.layout, out.device))
    call = (0, tuple(good), out.data_ptr(), 0, out.numel())
    fields = {
        0: (len(FORMATS), "format"),
        1: (-1, "numel"),
        2: (63, "blocksize"),
        4: (0, "nested_blocksize"),
        5: (0, "packed"),
        6: (good[6] - 1, "packed"),
        7: (0, "absmax"),
        8: (good[8] - 1, "absmax"),
        10: (good[10] - 1, "nested_absmax"),
        11: (0, "nested_code"),
        12: (0, "nested_offset"),
    }
    for field, (value, name) in fields.items():
        wrong = (*good[:field], value, *good[field + 1 :])
        with pytest.raises(ValueError, match=rf"\b{name}"):
            emulated_cuda.nf4_dequantize(0, wrong, *call[2:])
    cases = (
        (1, (), "w: got 0, expected 13 fields"),
        (2, 0, "out"),
        (3, 9, "dtype"),
        (4, 1, "out"),
    )
    check_refusals(emulated_cuda.nf4_dequantize, call, cases)
    packed, absmax = torch.zeros(32, dtype=torch.uint8), torch.zeros(1)
    call = [0, out.data_ptr(), 0, 64, 64, packed.data_ptr(), 32, absmax.data_ptr(), 1]
    cases = (
        (1, 0, "src"),
        (2, 3, "dtype"),
        (3, 65, "packed"),
        (3, -1, "numel"),
        (4, 31, "blocksize"),
        (5, 0, "packed"),
        (6, 31, "packed"),
        (7, 0, "absmax"),
        (8, 0, "absmax"),
    )
    check_refusals(emulated_cuda.nf4_quantize, call, cases)


# Dispatch


def test_refusals_say_why():
    x = torch.zeros(2, 64, dtype=torch.float64)
    with pytest.raises(peftkern.BackendUnavailableError, match=r"the dtype is torch\.float64"):
        ops.nf4_quantize(x, 64)
    with pytest.raises(peftkern.BackendUnavailableError, match="has no back end 'cuda'"):
        ops.lora_linear_forward(x, x, x, x, None, 1.0, None, 0.0)
    with peftkern.use_backend(None):
        assert peftkern.explain("nf4_quantize", x.float(), 64).chosen("nf4_quantize") == "cpu"
    assert peftkern.explain("nf4_quantize", x.float(), 64).chosen("nf4_quantize") == "cuda"


def test_a_cpu_is_refused_by_what_runs_on_a_gpu(monkeypatch):
    def says(module, reason):
        monkeypatch.setattr(cuda, "cuda_module", lambda: (module, reason))
        with pytest.raises(peftkern.BackendUnavailableError) as error:
            ops.nf4_quantize(torch.zeros(64), 64)
        return str(error.value)

    assert says(None, "not built").endswith("tensors are on cpu")
    for_a_gpu = ModuleType("for_a_gpu")
    for_a_gpu.emulated = False
    assert says(for_a_gpu, None).endswith("tensors are on cpu")


def test_what_the_library_cannot_serve(monkeypatch):
    gpu = torch.device("cuda:0")

    def reason(module, why=None):
        monkeypatch.setattr(cuda, "cuda_module", lambda: (module, why))
        return cuda.refusal_device(gpu)

    assert reason(None, "it is not built") == "it is not built"
    for driver, end in ((12080, "finds no GPU: the driver is for CUDA 12.8"), (0, "is missing")):
        module = ModuleType("of_a_machine_without_a_gpu")
        module.emulated = False
        module.device_count = lambda: 0
        module.runtime_version = lambda: 13020
        module.driver_version = lambda driver=driver: driver
        assert "built with CUDA 13.2" in reason(module)
        assert reason(module).endswith(end)
    for_a_cpu = ModuleType("for_a_cpu")
    for_a_cpu.emulated = True
    assert reason(for_a_cpu) == "the kernels are a CPU's, not for cuda:0"
    assert cuda.refusal_device(torch.device("cpu")) is None


def test_which_code_runs_on_which_gpu():
    usual = ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120", "compute_120"]
    for capability in ((8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (12, 1), (13, 0)):
        assert cuda.covers(usual, capability), capability
    for capability in ((7, 5), (11, 0)):
        assert not cuda.covers(usual, capability), capability
    assert not cuda.covers(["sm_90a"], (10, 0))
    assert not cuda.covers(["sm_86"], (8, 0))
    assert cuda.covers(["sm_80", "compute_80"], (9, 0))
    assert cuda.covers(["sm_120a"], (12, 0))


def test_triton_comes_first_until_a_measurement_says_otherwise():
    for op, candidates in dispatch.CANDIDATES.items():
        names = [candidate.name for candidate in candidates]
        if "cuda" in names:
            assert names[:2] == ["triton", "cuda"], op
