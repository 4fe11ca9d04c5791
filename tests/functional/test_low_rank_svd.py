"""The SVD of low-rank updates against a dense SVD in float64, on every back end of a CPU."""

from __future__ import annotations

import math

import pytest
import torch
from grids import examples, thinned
from hypothesis import given
from hypothesis import strategies as st
from linear_cases import BF16, F16, F32, F64
from low_rank_svd_cases import (
    FLOAT32_STEP,
    SHAPES,
    check,
    check_condition,
    check_equal_bits,
    check_list,
    check_one_graded_factor,
    check_shape,
    edge_cases,
    equal,
    graded,
    of_layer,
    orthonormal,
    ragged,
)
from nf4_weights import assert_same_every_time
from tolerances import FUZZ_SVD_SHARE, SVD_BOUNDS, SVD_BOUNDS_64

import peftkern
from peftkern.backends.cpu import low_rank_svd as cpu
from peftkern.backends.programs import PLAIN
from peftkern.functional.low_rank_svd import low_rank_svd, low_rank_svdvals

EDGES = edge_cases((4, 9, 66), (math.nan, math.inf, -math.inf), count=11)


# ---- accuracy


@pytest.mark.parametrize(("shape", "dtype"), thinned([*SHAPES, (1100, 300, 8)], [F32, BF16, F16]))
def test_shapes(every_kernel, shape, dtype):
    check_shape(*shape, dtype)


@pytest.mark.parametrize(
    ("r", "kappa"),
    thinned([2, 7, 16, 33, 66], [1, 1e1, 1e2, 1e3, 1e4, 9e4, 1e5, 3e5, 1e6], diagonals=2),
)
def test_condition_numbers(every_kernel, r, kappa):
    check_condition(400, 350, r, kappa)


@pytest.mark.parametrize("kappa", [1, 1e3, 1e6])
def test_one_graded_factor(every_kernel, kappa):
    check_one_graded_factor(kappa)


@pytest.mark.parametrize("edge", EDGES)
def test_edges(every_kernel, edge):
    EDGES[edge]()


@pytest.mark.parametrize("scaling", [2.0**-126, 1e-37, 1e38, 2.0**127])
def test_singular_values_at_the_ends_of_float32_are_none_of_these(every_kernel, scaling):
    """Orthonormal columns: every singular value is the scaling."""
    U, V = orthonormal(60, 5).float(), orthonormal(50, 5).float()
    svd = low_rank_svd(U, V.T, 1.001 * scaling)
    assert int(svd.info) == 0
    check(svd._replace(S=svd.S / scaling), U, V.T, 1.001)


def test_values_that_rounded_to_zero_still_count(every_kernel):
    """A wide range within one pair: the smallest value is none of float32's, the others are."""
    B, A = torch.zeros(6, 3), torch.zeros(3, 5)
    B[0, 0], B[1, 1], B[2, 2] = 1e-20, 1e-25, 1e-30
    A[0, 0] = A[1, 1] = A[2, 2] = 1e-15
    svd = low_rank_svd(B, A)
    assert (int(svd.info), int(svd.rank)) == (-2, 3)
    wanted = torch.tensor([1e-35, 1e-40, 1e-45], dtype=F64)
    assert ((svd.S - wanted).abs() <= SVD_BOUNDS[1] * wanted + FLOAT32_STEP).all()
    for vectors in (svd.U[:3], svd.Vh[:, :3]):
        assert (vectors.abs() - torch.eye(3)).abs().max() <= SVD_BOUNDS[2]


def test_float64_factors_give_such_values_in_float64():
    B, A = torch.randn(64, 8, dtype=F64) * 1e25, torch.randn(8, 48, dtype=F64) * 1e25
    svd = low_rank_svd(B, A)
    assert int(svd.info) == 0
    check(svd._replace(S=svd.S * 1e-50), B * 1e-25, A * 1e-25, bounds=SVD_BOUNDS_64)
    for scales in ((1e200, 1e200, 1.0), (1e-200, 1e-200, 1.0), (1e-170, 1e-100, 1e-50)):
        B, A = torch.randn(20, 3, dtype=F64) * scales[0], torch.randn(3, 30, dtype=F64) * scales[1]
        svd = low_rank_svd(B, A, scales[2])
        assert (int(svd.info), int(svd.rank)) == (-2, 3)
        B, A = B / scales[0], A / scales[1]
        sigma = torch.linalg.svdvals(B @ A)[:3]
        check(svd._replace(S=sigma, info=torch.tensor(0)), B, A, bounds=SVD_BOUNDS_64)


@pytest.mark.parametrize(
    "scales", [(1e200, 1e200, 1e-300), (1e-200, 1e-200, 1e300), (1e-200, 1e250, 1e-40)]
)
def test_no_product_of_scales_is_beyond_float64_but_the_last(scales):
    B, A = torch.randn(20, 3, dtype=F64), torch.randn(3, 30, dtype=F64)
    svd = low_rank_svd(B * scales[0], A * scales[1], scales[2])
    size = round(sum(map(math.log10, scales)))
    assert int(svd.info) == 0
    check(svd._replace(S=svd.S / 10.0**size), B, A, bounds=SVD_BOUNDS_64)


def test_nan_beyond_jacobis_ranks(every_kernel):
    B = torch.randn(80, 66)
    B[1, 2] = math.nan
    svd = low_rank_svd(B, torch.randn(66, 70))
    assert int(svd.info) == -1 and all(tensor.isnan().all() for tensor in svd[:3])


def test_float64_keeps_float64():
    B, A = graded(300, 200, 12, 1e3)
    svd = low_rank_svd(B, A, 2.0)
    check(svd, B, A, 2.0, SVD_BOUNDS_64)
    mixed = low_rank_svd([B.float(), B.bfloat16()], [A, A.float()])
    assert {tensor.dtype for tensor in (*mixed.U, *mixed.S, *mixed.Vh)} == {F64}
    check(of_layer(mixed, 0), B.float(), A, bounds=SVD_BOUNDS_64)


def test_float64_factors_near_overflow():
    B, A = torch.randn(30, 4, dtype=F64) * 1e200, torch.randn(4, 20, dtype=F64) * 1e-190
    svd = low_rank_svd(B, A, 1e-5)
    check(svd, B * 1e-200, A * 1e190, bounds=(math.inf, math.inf, SVD_BOUNDS_64[2], math.inf))
    sigma = torch.linalg.svdvals((B * 1e-200) @ (A * 1e190))[:4]
    assert torch.allclose(svd.S / 1e5, sigma, rtol=SVD_BOUNDS_64[1])


@examples(FUZZ_SVD_SHARE)
@given(
    st.integers(1, 70),
    st.integers(1, 70),
    st.integers(1, 20),
    st.sampled_from([F32, BF16, F16]),
    st.sampled_from([F32, BF16, F16]),
    st.floats(-8, 8).filter(lambda scaling: scaling == 0 or abs(scaling) > 1e-9),
    st.integers(0, 2**32 - 1),
)
def test_any_factors(m, n, r, B_dtype, A_dtype, scaling, seed):
    """Zeros, repeats and powers of ten among the columns; both back ends within the bounds."""
    torch.manual_seed(seed)
    B, A = torch.randn(m, r), torch.randn(r, n)
    B *= 10.0 ** torch.randint(-2, 3, (r,))
    B[:, torch.rand(r) < 0.1] = 0.0
    A[torch.rand(r) < 0.2] = A[0].clone()
    B, A = B.to(B_dtype), A.to(A_dtype)
    for name in ("cpu", "reference"):
        with peftkern.use_backend(name):
            svd = low_rank_svd(B, A, scaling)
        if (scaling * (B.double() @ A.double())).any():
            check(svd, B, A, scaling)
        else:
            assert int(svd.rank) == 0


# ---- lists, threads


def test_ragged_lists_equal_single_pairs(every_kernel):
    check_list(*ragged(), alone=range(30))


def test_empty_list(every_kernel):
    svd = low_rank_svd([], [])
    assert svd[:3] == ([], [], [])
    assert svd.rank.shape == svd.info.shape == (0,) and svd.rank.dtype is torch.int64
    assert low_rank_svdvals([], []) == []


@pytest.mark.parametrize("r", [3, 16, 32])
def test_bits_do_not_depend_on_threads(every_kernel, r):
    if every_kernel in PLAIN:
        pytest.skip(
            "no code of ours: the reference is torch's LAPACK, whose bits may depend on its threads"
        )
    Bs, As = [torch.randn(3000, r), torch.randn(70, r)], [torch.randn(r, 2500), torch.randn(r, 9)]
    Bs.append(graded(2100, 50, r, 1e6)[0].float())  # a second pass
    As.append(torch.randn(r, 4100))
    assert_same_every_time(lambda: low_rank_svd(Bs, As), 4, threads=(1, 2, 3, 7))


def test_bit_identical(every_kernel):
    check_equal_bits(12)


def test_nothing_has_a_gradient(every_kernel):
    B, A = torch.randn(30, 4, requires_grad=True), torch.randn(4, 20, requires_grad=True)
    svd = low_rank_svd(B, A)
    assert not any(tensor.requires_grad for tensor in svd)
    with torch.autocast("cpu", torch.bfloat16):
        assert equal(low_rank_svd(B, A), svd)


def test_sweeps_are_bounded_and_counted():
    cores = torch.randn(3, 24, 24, dtype=F64)
    *_, left = cpu.jacobi_svd(cores, 1, True)
    assert (left > 0).all()
    sigma, _, _, left = cpu.jacobi_svd(cores, cpu.JACOBI_SWEEPS, False)
    assert not left.any()
    assert torch.allclose(sigma, torch.linalg.svdvals(cores), rtol=SVD_BOUNDS_64[1])


def test_unconverged_pairs_reach_info(monkeypatch):
    monkeypatch.setattr(cpu, "JACOBI_SWEEPS", 1)
    with peftkern.use_backend("cpu"):
        svd = low_rank_svd(torch.randn(50, 20), torch.randn(20, 40))
    assert int(svd.info) > 0 and torch.isfinite(svd.U).all()


def test_meta_tensors_take_the_fake():
    svd = low_rank_svd([torch.zeros(9, 3, device="meta")], [torch.zeros(3, 2, device="meta")])
    assert [t.shape for t in (svd.U[0], svd.S[0], svd.Vh[0])] == [(9, 2), (2,), (2, 2)]
    assert svd.U[0].is_meta


# ---- arguments

B0, A0 = torch.ones(6, 2), torch.ones(2, 5)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((B0, [A0]), TypeError, "lora_B, lora_A: expected two tensors or two lists"),
        (([B0], [A0, A0]), ValueError, "lora_A: expected 1 tensors as in lora_B, got 2"),
        (([B0, 3], [A0, A0]), TypeError, r"lora_B\[1\]: expected a tensor, got int"),
        ((B0[0], A0), ValueError, r"lora_B: expected \[m, r\], got \(2,\)"),
        ((B0, A0[None]), ValueError, r"lora_A: expected \[r, n\], got \(1, 2, 5\)"),
        ((B0, A0.T), ValueError, r"lora_A: expected 2 rows as lora_B has columns, got \(5, 2\)"),
        ((B0.int(), A0), ValueError, "lora_B: expected one of .*got torch.int32"),
        ((B0, A0.to(torch.complex64)), ValueError, "lora_A: .*got torch.complex64"),
        ((B0, A0.to("meta")), ValueError, "lora_A: expected all on cpu, got meta"),
        (([B0], [A0], [1.0, 2.0]), ValueError, "scaling: expected 1 numbers, got 2"),
    ],
)
def test_bad_arguments(args, error, message):
    for function in (low_rank_svd, low_rank_svdvals):
        with pytest.raises(error, match=message):
            function(*args)


def test_unknown_mode():
    with pytest.raises(ValueError, match=r"mode: expected one of .*got 'exact'"):
        low_rank_svd(B0, A0, mode="exact")


def test_native_refuses_what_does_not_fit():
    none = cpu.Places([0], [0], [0])
    pairs = cpu.low_rank_pairs([B0], [A0], 2, none)
    cores, inverse, scale, floor, info = cpu.low_rank_cores(pairs, 2, [1.0], True)
    sigma, left, right, _ = cpu.jacobi_svd(cores, 30, True)
    rest = (inverse, scale, floor, info, False)
    for change, message in [
        ((sigma, left, None), "left, right: expected both or none"),
        ((sigma, left, right), "s: null pointer"),
        ((sigma[:, :1], left, right), "sigma: expected 2 contiguous"),
        ((sigma, left.float(), right), "left: expected 4 contiguous torch.float64"),
    ]:
        with pytest.raises(ValueError, match=message):
            cpu.low_rank_results(pairs, 2, change, *rest)
    with pytest.raises(ValueError, match="s: null pointer"):
        cpu.low_rank_pairs_svd(pairs, 2, [1.0], True, False, False)
    with pytest.raises(ValueError, match="u, vh: null pointer"):
        places = cpu.Places([0], [sigma.data_ptr()], [0])
        with_s = cpu.low_rank_pairs([B0], [A0], 2, places)
        cpu.low_rank_pairs_svd(with_s, 2, [1.0], True, True, False)
    out = [[torch.empty(6, 2)], [torch.empty(2)], [torch.empty(2, 4)]]
    counts = (torch.empty(1, dtype=torch.int64), torch.empty(1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"Vh\[0\]: expected 10 contiguous"):
        cpu.low_rank_svd_out([B0], [A0], [1.0], "fast", *out, *counts)
    with pytest.raises(ValueError, match="lora_B\\[0\\]: expected 18 contiguous"):
        cpu.low_rank_pairs([B0], [A0], 3, none)
    with pytest.raises(ValueError, match="cores: expected"):
        cpu.jacobi_svd(cores.float(), 30, True)
