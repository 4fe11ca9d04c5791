"""nf4_lora_linear's kernel for 33 to 512 rows, compiled for this CPU, against float64 and torch.

The arrangement of its products, on sizes that wrap its buffers, is tested in C++ beside the
emulation: csrc/tests/cuda_nf4_lora_linear_sm90a_test.cpp.
"""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from cuda_cases import OP, check, exact, forward, with_splits
from gpu_cases import nf4_cases, nf4_operands
from grids import examples, thinned
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from linear_cases import BF16, F16, F32, layouts
from nf4_weights import assert_same_bits
from tolerances import assert_as_accurate_as_torch

import peftkern
from peftkern.backends.cuda import nf4_lora_linear as cuda

pytestmark = pytest.mark.usefixtures("served_by_cuda")


@pytest.mark.parametrize(
    ("M", "double_quant", "dtype"),
    thinned([33, 64, 65, 128, 129], [False, True], [BF16, F16], diagonals=2),
)
def test_every_tile_of_rows(M, double_quant, dtype):
    check(nf4_cases((M, 37, 192, 5), dtype, F32, double_quant=double_quant))
    assert peftkern.stats().calls[OP, "cuda"]


@settings(
    examples(0.2),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    M=st.integers(33, 80),
    N=st.integers(1, 192),
    units=st.integers(1, 4),
    r=st.integers(1, 30),
    dtypes=st.sampled_from([(BF16, F32), (F16, F32), (BF16, BF16), (F16, F16), (BF16, F16)]),
    blocksize=st.sampled_from([64, 64, 128, 1024]),
    double_quant=st.booleans(),
    bias=st.booleans(),
    lora=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_call(M, N, units, r, dtypes, blocksize, double_quant, bias, lora, seed):
    torch.manual_seed(seed)
    options = {"blocksize": blocksize, "double_quant": double_quant, "bias": bias}
    check(nf4_cases((M, N, 64 * units, r), *dtypes, **options), lora)


@pytest.mark.parametrize(("r", "adapter"), [(1, F32), (16, F16), (64, BF16), (256, F32)])
def test_ranks_and_adapters(adapter, r):
    check(nf4_cases((35, 40, 128, r), BF16, adapter))


def test_float16_update_beyond_its_range():
    """s is neither rounded to float16 nor limited to its range."""
    o = nf4_operands((33, 40, 64, 4), F16, F32)
    check([replace(o, lora_A=o.lora_A * 1e5, lora_B=o.lora_B * 1e-5)])


@pytest.mark.parametrize("splits", [1, 2, 3, 16])
def test_splits(splits):
    o = nf4_operands((40, 140, 256, 7), BF16, F32)
    y, S = with_splits(o, splits, prefill=True)
    with peftkern.use_backend("reference"):
        eager, oracle = forward(o), exact(o)
    assert_as_accurate_as_torch(y, eager[0], oracle[0])
    assert_as_accurate_as_torch(S, eager[1], oracle[1])
    assert_same_bits(with_splits(o, splits, prefill=True)[0], y)


def test_an_infinite_s_stays_infinite():
    o = nf4_operands((33, 40, 64, 1), BF16, F32)
    o.x[:] = 0.0
    o.x[7, 5] = 1e37  # times W is finite
    o = replace(o, lora_A=torch.full_like(o.lora_A, 400.0), lora_B=torch.ones_like(o.lora_B))
    o.lora_B[3] = -math.pi
    y, S = forward(o)
    assert S[7, 0] == math.inf and y[7, 3] == -math.inf
    others = torch.arange(40) != 3
    assert (y[7, others] == math.inf).all() and y[:7].isfinite().all() and y[8:].isfinite().all()


def test_layouts_give_the_same():
    o = nf4_operands((40, 33, 128, 4), BF16, F32)
    y, S = forward(o)
    for name in layouts(o.x):
        other = forward(replace(o, x=layouts(o.x)[name]))
        assert_same_bits(other[0].reshape(y.shape), y)
        assert_same_bits(other[1].reshape(S.shape), S)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite_values_reach_their_rows_alone(value):
    o = nf4_operands((40, 33, 128, 4), BF16, F32)
    wanted = forward(o)[0]
    o.x[7, 5] = value
    y, S = forward(o)
    assert not y[7].isfinite().any() and not S[7].isfinite().any()
    rest = torch.arange(40) != 7
    assert_same_bits(y[rest], wanted[rest])


@pytest.mark.parametrize(
    ("shape", "options", "reason"),
    [
        ((513, 8, 64, 1), {}, "more than 512 rows"),
        ((33, 8, 96, 1), {}, "not a multiple of 64"),
        ((33, 8, 64, 1), {"blocksize": 32}, "below it"),
        ((33, 8, 64, 257), {}, "the rank is 257"),
    ],
)
def test_calls_that_are_refused(shape, options, reason):
    o = nf4_operands(shape, BF16, F32, **options)
    with pytest.raises(peftkern.backends.device.BackendUnavailableError, match=reason):
        forward(o)


def test_other_gpus_are_refused_in_words(emulated_cuda, monkeypatch):
    device = torch.device("cuda:0")
    monkeypatch.setattr(cuda, "refusal_device", lambda device: None)
    for architectures, capability, reason in (
        (["sm_80", "sm_90a"], (9, 0), None),
        (["sm_80", "sm_90a"], (8, 0), "compute capability 9.0, not 8.0"),
        (["sm_90"], (9, 0), "not for sm_90a"),
    ):
        module = SimpleNamespace(
            emulated=False, LINEAR_ROWS=32, architectures=lambda a=architectures: a
        )
        monkeypatch.setattr(cuda, "library", lambda m=module: m)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        said = cuda.refusal_sm90a(device)
        assert (said is None) if reason is None else reason in said
