"""nf4_lora_linear's CUDA kernels, compiled for this CPU, against float64 and eager torch.

One serves up to 32 rows, the other, `prefill`, 33 to 512. The arrangement of its products, on sizes
that wrap its buffers, is tested in C++: csrc/tests/cuda_nf4_lora_linear_test.cpp.
"""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from cuda_cases import OP, check, check_refusals, exact, forward, scheduled, with_splits
from gpu_cases import NF4Operands, nf4_cases, nf4_operands
from grids import examples, thinned
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from linear_cases import BF16, F16, F32, layouts
from nf4_weights import assert_same_bits, numpy_dequantize
from tolerances import assert_as_accurate_as_torch
from torch import Tensor

import peftkern
from peftkern.backends import ops, reference
from peftkern.backends.cuda import nf4_lora_linear as cuda
from peftkern.backends.pointers import weight

pytestmark = pytest.mark.usefixtures("served_by_cuda")


# Numerics


@pytest.mark.parametrize(
    ("M", "double_quant", "dtype"),
    [
        *thinned([1, 2, 7, 8, 9, 16, 17, 32], [False, True], [BF16, F16], diagonals=2),
        *thinned([33, 64, 65, 128, 129], [False, True], [BF16, F16], diagonals=2),
    ],
)
def test_every_number_of_rows(M, double_quant, dtype):
    check(nf4_cases((M, 37, 192, 5), dtype, F32, double_quant=double_quant))
    assert peftkern.stats().calls[OP, "cuda"]


@settings(
    examples(0.5),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    sizes=st.one_of(  # M, N, K / 64, r
        st.tuples(*(st.integers(1, most) for most in (32, 80, 9, 20))),
        st.tuples(st.integers(33, 80), *(st.integers(1, most) for most in (192, 4, 30))),
    ),
    dtypes=st.sampled_from([(BF16, F32), (F16, F32), (BF16, BF16), (F16, F16), (BF16, F16)]),
    blocksize=st.sampled_from([64, 64, 128, 256, 1024]),
    double_quant=st.booleans(),
    bias=st.booleans(),
    lora=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_call(sizes, dtypes, blocksize, double_quant, bias, lora, seed):
    """Blocks of a weight cross rows in prefill alone."""
    torch.manual_seed(seed)
    M, N, units, r = sizes
    K = 64 * units if M > 32 else -(-64 * units // blocksize) * blocksize
    options = {"blocksize": blocksize, "double_quant": double_quant, "bias": bias}
    check(nf4_cases((M, N, K, r), *dtypes, **options), lora)
    assert peftkern.stats().calls[OP, "cuda"]


@pytest.mark.parametrize("M", [5, 40])
def test_fp4_differs_in_its_table_alone(M):
    o = nf4_operands((M, 37, 192, 5), BF16, F32)
    w = replace(o.w, quant_type="fp4")
    check([replace(o, w=w, weight=numpy_dequantize(w, BF16))])
    assert peftkern.stats().calls[OP, "cuda"]


@pytest.mark.parametrize("blocksize", [512, 1024, 2048, 4096])
def test_large_blocks(blocksize):
    check(nf4_cases((3, 17, blocksize, 4), BF16, F32, blocksize=blocksize, double_quant=True))


@pytest.mark.parametrize(
    ("M", "r", "adapter"),
    [
        *thinned([4], [1, 16, 33, 64], [F32, BF16, F16]),
        *((35, *case) for case in [(1, F32), (16, F16), (64, BF16), (256, F32)]),
    ],
)
def test_ranks_and_adapters(M, r, adapter):
    check(nf4_cases((M, 40, 128, r), BF16, adapter))


@pytest.mark.parametrize(("splits", "M"), thinned([1, 2, 3, 16], [1, 12, 32]))
def test_split_over_blocks(splits, M):
    """The same sums in another order: an error as small, and the same S bit for bit."""
    o = nf4_operands((M, 70, 640, 6), BF16, F32)
    y, S = with_splits(o, splits)
    whole, whole_S = with_splits(o, 1)
    oracle, _ = exact(o)
    assert_as_accurate_as_torch(y, whole, oracle)
    assert_same_bits(S, whole_S)


@pytest.mark.parametrize(
    ("M", "splits", "schedule"), thinned([1, 11, 20], [1, 3], [1, 2, 3], diagonals=2)
)
def test_no_order_of_threads_changes_a_bit(emulated_cuda, M, splits, schedule):
    o = nf4_operands((M, 100, 448, 9), BF16, F32)
    wanted = with_splits(o, splits)
    with scheduled(emulated_cuda, schedule):
        got = with_splits(o, splits)
    assert_same_bits(got, wanted)


def test_a_weight_is_its_code_rounded_once():
    """Rows of x with a single one pick weights: between is only the rounding of their codes."""
    o = nf4_operands((32, 16, 64, 1), BF16, F32, bias=False)
    code = torch.tensor(peftkern.formats.nf4.NF4_CODE)
    octets = o.w.packed.view(16, 32).int()
    codes = torch.stack((octets >> 4, octets & 15), -1).view(16, 64)
    absmax = reference.block_scales(o.w.tensors, o.w.layout)[0]
    for first in (0, 32):
        o = replace(o, x=torch.eye(64, dtype=BF16)[first : first + 32])
        y, _ = forward(o, lora=False)
        wanted = (code[codes].to(BF16).float() * absmax[:, None]).to(BF16)
        assert_same_bits(y + 0.0, wanted.t()[first : first + 32].contiguous() + 0.0)


# NaN and infinity reach what they must and nothing else


@pytest.mark.parametrize(
    ("M", "splits", "value"), thinned([3, 20], [1, 3], [math.nan, math.inf, -math.inf], diagonals=2)
)
def test_not_finite_values_stay_where_they_belong(M, splits, value):
    o = nf4_operands((M, 50, 448, 9), BF16, F32, double_quant=False)
    plain, _ = with_splits(o, splits)

    def broken(name: str, place: tuple[int, ...]) -> Tensor:
        changed = getattr(o.w if name == "absmax" else o, name).clone()
        changed[place] = value
        if name == "absmax":
            return with_splits(replace(o, w=replace(o.w, absmax=changed)), splits)[0]
        return with_splits(replace(o, **{name: changed}), splits)[0]

    for y, row, column in (
        (broken("x", (M - 1, 447)), M - 1, slice(None)),
        (broken("absmax", (49 * 7 + 3,)), slice(None), 49),
        (broken("lora_A", (8, 300)), slice(None), slice(None)),
        (broken("lora_B", (17, 8)), slice(None), 17),
        (broken("bias", (48,)), slice(None), 48),
    ):
        hit = torch.zeros(M, 50, dtype=torch.bool)
        hit[row, column] = True
        assert not y[hit].isfinite().any()
        assert_same_bits(y[~hit], plain[~hit])


# Prefill


def test_float16_update_beyond_its_range():
    """s is neither rounded to float16 nor limited to its range."""
    o = nf4_operands((33, 40, 64, 4), F16, F32)
    check([replace(o, lora_A=o.lora_A * 1e5, lora_B=o.lora_B * 1e-5)])


@pytest.mark.parametrize("splits", [1, 2, 3, 16])
def test_split_of_prefill(splits):
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


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite_values_reach_their_rows_alone(value):
    o = nf4_operands((40, 33, 128, 4), BF16, F32)
    wanted = forward(o)[0]
    o.x[7, 5] = value
    y, S = forward(o)
    assert not y[7].isfinite().any() and not S[7].isfinite().any()
    rest = torch.arange(40) != 7
    assert_same_bits(y[rest], wanted[rest])


# Layouts


@pytest.mark.parametrize("M", [6, 40])
@pytest.mark.parametrize("name", ["transposed", "sliced", "misaligned", "3-d"])
def test_layouts(name, M):
    o = nf4_operands((M, 33, 128, 3), BF16, F32)
    wanted = forward(o)
    moved = replace(
        o,
        x=layouts(o.x)[name],
        lora_A=layouts(o.lora_A)[name.replace("3-d", "sliced")],
        lora_B=layouts(o.lora_B)[name.replace("3-d", "transposed")],
        bias=torch.stack((o.bias, o.bias), 1)[:, 0],
    )
    y, S = forward(moved)
    assert y.shape == (*moved.x.shape[:-1], 33) and S.shape == (*moved.x.shape[:-1], 3)
    assert_same_bits(y.reshape(M, 33), wanted[0])
    assert_same_bits(S.reshape(M, 3), wanted[1])


@pytest.mark.parametrize("lora", [True, False])
def test_no_rows(lora):
    o = nf4_operands((1, 33, 128, 3), BF16, F32)
    y, S = forward(replace(o, x=o.x.new_empty(2, 0, 128)), lora)
    assert y.shape == (2, 0, 33) and S.shape == ((2, 0, 3) if lora else (0,))


def test_functions_without_gradients():
    o = nf4_operands((4, 40, 128, 6), BF16, F32)
    with torch.no_grad():
        options = {"scaling": o.scaling, "bias": o.bias}
        y = peftkern.nf4_lora_linear(o.x, o.w, o.lora_A, o.lora_B, **options)
        bare = peftkern.nf4_linear(o.x, o.w, o.bias)
    assert_same_bits(y, forward(o)[0])
    assert_same_bits(bare, forward(o, lora=False)[0])
    assert {op for op, backend in peftkern.stats().calls if backend == "cuda"} == {OP}


# Wrong arguments


def refusal(o: NF4Operands, keep: Tensor | None = None) -> str:
    weight = (o.w.tensors, o.w.layout)
    with pytest.raises(peftkern.BackendUnavailableError) as error:
        ops.nf4_lora_linear_forward(o.x, *weight, o.lora_A, o.lora_B, o.bias, 1.0, keep, 0.1)
    return str(error.value)


def test_refusals_say_why():
    o = nf4_operands((2, 24, 128, 3), BF16, F32)
    assert "the dtype is torch.float32" in refusal(replace(o, x=o.x.float()))
    for shape, options, reason in (
        ((2, 24, 128, 3), {"blocksize": 32}, "blocks of 32 are below 64"),
        ((2, 24, 128, 3), {"blocksize": 256}, "cross rows of 128"),
        ((2, 24, 128, 65), {}, "the rank is 65"),
        ((513, 8, 64, 1), {}, "more than 512 rows"),
        ((33, 8, 96, 1), {}, "not a multiple of 64"),
        ((33, 8, 64, 1), {"blocksize": 32}, "below it"),
        ((33, 8, 64, 257), {}, "the rank is 257"),
    ):
        assert reason in refusal(nf4_operands(shape, BF16, F32, **options))
    assert "the dtype of lora_B" in refusal(replace(o, lora_B=o.lora_B.double()))
    assert "dropout" in refusal(o, torch.zeros(1, dtype=torch.int64))
    memory = torch.cat((o.w.packed.new_zeros(4), o.w.packed))
    moved = replace(o, w=replace(o.w, packed=memory[4:]))
    assert "does not begin at a multiple of 8 bytes" in refusal(moved)


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


def test_tensor_that_does_not_fit_is_refused_by_name():
    o = nf4_operands((2, 24, 128, 3), BF16, F32)
    changes = {
        "x": o.x.t().contiguous().t(),
        "lora_A": o.lora_A[:, :64],
        "lora_B": o.lora_B[:23],
        "bias": o.bias.float(),
    }
    for name, value in changes.items():
        with pytest.raises(ValueError, match=rf"^{name}: expected .* got "):
            with_splits(replace(o, **{name: value}), 0)


def test_library_checks_sizes_itself(emulated_cuda):
    o = nf4_operands((2, 24, 256, 3), BF16, F32)
    w = weight(o.w.tensors, o.w.layout)
    y, S = torch.zeros(2, 24, dtype=BF16), torch.zeros(2, 3)
    workspace = torch.zeros(emulated_cuda.nf4_lora_linear_workspace(2, 24, 256, 2) + 16)
    lora = (o.lora_A.data_ptr(), 0, o.lora_B.data_ptr(), 0, S.data_ptr(), 3)
    tensors = (o.x.data_ptr(), 1, y.data_ptr(), o.bias.data_ptr())
    size = workspace.numel()
    call = (0, w, 2, 24, 256, *tensors, lora, 1.0, workspace.data_ptr(), size, 2)
    cases = (
        (1, (), "w: got 0, expected 13 fields"),
        (1, (*w[:2], 512, *w[3:]), "absmax|blocksize"),
        (2, 33, "M"),
        (2, -1, "M"),
        (3, 0, "N"),
        (3, 25, "w"),
        (4, 255, "K"),
        (4, 320, "w"),
        (5, 0, "x: null"),
        (5, call[5] + 2, "x"),
        (6, 0, "dtype"),
        (6, 7, "dtype"),
        (7, 0, "y: null"),
        (8, call[8] + 1, "bias"),
        (9, (), "lora: got 0, expected 6 fields"),
        (9, (*lora[:5], 65), "r: got 65"),
        (9, (0, *lora[1:]), "lora_A: null"),
        (9, (*lora[:2], lora[2] + 2, *lora[3:]), "lora_B"),
        (9, (*lora[:4], 0, 3), "s: null"),
        (11, 0, "workspace: null"),
        (12, 3, "workspace"),
        (13, 17, "splits"),
    )
    check_refusals(emulated_cuda.nf4_lora_linear_forward, call, cases)
    with pytest.raises(ValueError, match="K"):
        emulated_cuda.nf4_lora_linear_workspace(1, 1, 65, 0)
