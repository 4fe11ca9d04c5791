"""The low-rank SVD on the CUDA kernel, compiled for this CPU, against LAPACK in float64."""

from __future__ import annotations

import math

import pytest
import torch
from cuda_cases import check_refusals, scheduled
from grids import thinned
from linear_cases import BF16, F16, F32, F64
from low_rank_svd_cases import (
    SHAPES,
    check,
    check_condition,
    check_cores,
    check_equal_bits,
    check_list,
    check_one_graded_factor,
    check_shape,
    check_signs_of_the_cpu,
    edge_cases,
    orthonormal,
    ragged,
)
from tolerances import SVD_BOUNDS_64
from torch import Tensor

import peftkern
from peftkern import BackendUnavailableError
from peftkern.backends.cpu import low_rank_svd as cpu
from peftkern.backends.cuda import low_rank_svd as cuda
from peftkern.functional.low_rank_svd import low_rank_svd

KIB = 1024
SIZES = [1, 2, 3, 5, 16, 17, 31, 32, 33, 64, 65]
# Shared memory of sm_90, sm_80 and sm_86: with it all of Q, some of it, and not even X finds room.
SHARED = [227 * KIB, 163 * KIB, 99 * KIB]


pytestmark = pytest.mark.usefixtures("served_by_cuda")


Svd = tuple[Tensor, Tensor, Tensor, Tensor]


def jacobi(cores: Tensor, shared: int = 0) -> Svd:
    return cuda.jacobi_svd(cores, cuda.JACOBI_SWEEPS, True, shared)


def with_sigma(sigma: Tensor) -> Tensor:
    r = len(sigma)
    return ((orthonormal(r, r) * sigma) @ orthonormal(r, r))[None].contiguous()


# ---- the kernel


@pytest.mark.parametrize("r", SIZES)
def test_random_cores(r):
    cores = torch.randn(3, r, r, dtype=F64)
    svd = jacobi(cores)
    check_cores(svd, cores)
    assert torch.equal(cuda.jacobi_svd(cores, cuda.JACOBI_SWEEPS, False)[0], svd[0])


@pytest.mark.parametrize(("r", "shared"), thinned([100, 121, 128], SHARED))
def test_cores_larger_than_shared_memory(r, shared):
    cores = torch.randn(2, r, r, dtype=F64)
    check_cores(jacobi(cores, shared), cores)


def test_no_bit_depends_on_where_a_row_lies(emulated_cuda):
    cores = torch.randn(1, 80, 80, dtype=F64)
    wanted = jacobi(cores)
    limits = [*(kib * KIB for kib in (227, 100, 64, 52, 48)), 4 * KIB]
    spilled = {emulated_cuda.jacobi_workspace(80, True, limit) for limit in limits}
    assert len(spilled) > 3 and 0 in spilled and 80 * 160 in spilled
    for limit in limits:
        got = jacobi(cores, limit)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True)), limit


@pytest.mark.parametrize(("r", "kappa"), thinned([5, 16, 33, 64], [1e2, 1e4, 1e8, 1e12]))
def test_graded_cores(r, kappa):
    cores = with_sigma(torch.logspace(0, -math.log10(kappa), r, dtype=F64))
    check_cores(jacobi(cores), cores)
    rows = torch.logspace(0, -math.log10(kappa), r, dtype=F64)[:, None] * torch.randn(1, r, r)
    check_cores(jacobi(rows), rows)
    assert jacobi(rows)[0][0] == pytest.approx(
        cpu.jacobi_svd(rows, 30, False)[0][0], rel=SVD_BOUNDS_64[1]
    )


@pytest.mark.parametrize("r", [4, 17, 32])
def test_repeated_sigma_of_cores(r):
    """Vectors of a repeated value are any basis of their subspace."""
    sigma = torch.ones(r, dtype=F64)
    sigma[r // 2 :] = 0.25
    cores = with_sigma(sigma)
    svd = jacobi(cores)
    check_cores(svd, cores)
    U, _, Vh = torch.linalg.svd(cores)
    for got, wanted in ((svd[1], U), (svd[2], Vh.mT)):
        got, wanted = got[0, :, : r // 2], wanted[0, :, : r // 2]
        assert (got @ got.T - wanted @ wanted.T).abs().max() <= SVD_BOUNDS_64[2]
    unit = torch.eye(r, dtype=F64).expand(2, r, r).contiguous()
    check_cores(jacobi(unit), unit)


@pytest.mark.parametrize("exponent", [-300, -70, -20, 20, 70, 300])
def test_powers_of_two_change_no_bit(exponent):
    cores = torch.randn(2, 9, 9, dtype=F64)
    wanted, scale = jacobi(cores), 2.0 ** round(exponent * math.log2(10))
    sigma, *others = jacobi(cores * scale)
    assert torch.equal(sigma, wanted[0] * scale)
    assert all(torch.equal(a, b) for a, b in zip(others, wanted[1:], strict=True))
    check_cores(jacobi(cores * 10.0**exponent), cores * 10.0**exponent, 10.0**exponent)


def test_subnormal_and_largest_cores():
    for value in (5e-324, 1e-310, 1.7e308):
        sigma, left, right, info = jacobi(torch.full((1, 1, 1), -value, dtype=F64))
        assert sigma.item() == value and left.item() == 1.0 and right.item() == -1.0
        assert not info.any()


@pytest.mark.parametrize("r", [1, 2, 16, 33, 64])
def test_zero_and_rank_deficient_cores(r):
    zero = torch.zeros(2, r, r, dtype=F64)
    sigma, left, right, info = jacobi(zero)
    assert not sigma.any() and not right.any() and not info.any()
    assert torch.equal(left.mT @ left, torch.eye(r, dtype=F64).expand(2, r, r))
    k = (r + 1) // 2
    cores = torch.randn(3, r, k, dtype=F64) @ torch.randn(3, k, r, dtype=F64)
    cores[1, :, r // 2] = cores[1, :, 0]
    cores[2, k - 1 :] = 0.0
    check_cores(jacobi(cores), cores)


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize("r", [3, 16, 20, 64])
def test_one_bad_core_leaves_the_others(r, bad):
    cores = torch.randn(4, r, r, dtype=F64)
    wanted = jacobi(cores)
    cores[1, r - 1, r // 2] = cores[3, 0, 0] = bad
    svd = jacobi(cores)
    assert svd[3].tolist() == [0, -1, 0, -1]
    for got, want in zip(svd[:3], wanted[:3], strict=True):
        assert got[1].isnan().all() and got[3].isnan().all()
        assert torch.equal(got[::2], want[::2])
    sigma, *_, info = cuda.jacobi_svd(cores, cuda.JACOBI_SWEEPS, False)
    assert sigma[1].isnan().all() and info.tolist() == [0, -1, 0, -1]


@pytest.mark.parametrize(
    ("size", "schedule"),
    thinned([(16, 0), (33, 0), (66, 64 * KIB), (66, 8 * KIB)], [1, 2, 3]),
)
def test_no_order_of_threads_changes_a_bit(emulated_cuda, size, schedule):
    r, shared = size
    cores = torch.randn(2, r, r, dtype=F64)
    cores[1, 0, 0] = math.nan
    wanted = jacobi(cores, shared)
    with scheduled(emulated_cuda, schedule):
        got = jacobi(cores, shared)
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a.nan_to_num(nan=0.5), b.nan_to_num(nan=0.5))


def test_same_vectors_as_on_a_cpu():
    cores = torch.randn(3, 20, 20, dtype=F64)
    for got, want in zip(jacobi(cores), cpu.jacobi_svd(cores, 30, True), strict=True):
        assert (got - want).abs().max() <= SVD_BOUNDS_64[1]


def test_sweeps_are_bounded_and_counted():
    cores = torch.randn(2, 24, 24, dtype=F64)
    *_, left = cuda.jacobi_svd(cores, 1, True)
    assert (left > 0).all() and (left <= 24 * 23 // 2).all()
    sigma, U, V, left = cuda.jacobi_svd(cores, 0, True)
    assert not left.any() and torch.isfinite(sigma).all()
    # Without a sweep it is the QR decomposition that Jacobi begins with.
    assert (U * sigma[:, None] @ V.mT - cores).abs().max() <= 24 * SVD_BOUNDS_64[3]


def test_no_cores():
    for shape in ((0, 4, 4), (3, 0, 0)):
        sigma, left, right, info = jacobi(torch.zeros(shape, dtype=F64))
        assert sigma.shape == shape[:2] and left.shape == right.shape == shape
        assert info.tolist() == [0] * shape[0]


def test_cores_that_do_not_fit_are_refused_by_name():
    good = torch.zeros(2, 3, 3, dtype=F64)
    for wrong in (good[0], good[:, :2], torch.zeros(1, 129, 129, dtype=F64), good.float()):
        with pytest.raises(ValueError, match=r"^cores: expected .* got "):
            jacobi(wrong)
    with pytest.raises(ValueError, match=r"^cores: expected .* got .* strides"):
        jacobi(torch.randn(2, 3, 3, dtype=F64).mT)
    with pytest.raises(ValueError, match="sweeps: got -1"):
        cuda.jacobi_svd(good, -1, True)


def test_library_checks_sizes_itself(emulated_cuda):
    cores, r = torch.zeros(2, 70, 70, dtype=F64), 70
    sigma, left, right = torch.zeros(2, r, dtype=F64), torch.zeros_like(cores), cores.clone()
    limit = 60 * KIB
    each = emulated_cuda.jacobi_workspace(r, True, limit)
    workspace, info = torch.zeros(2 * each, dtype=F64), torch.zeros(2, dtype=torch.int64)
    pointers = [tensor.data_ptr() for tensor in (cores, sigma, left, right, info, workspace)]
    call = [0, 2, r, 20, *pointers, 2 * each, limit]
    cases = (
        (1, -1, "count"),
        (1, 1 << 60, "count"),
        (2, 129, "r: got 129"),
        (2, -1, "r: got -1"),
        (3, -1, "sweeps"),
        (4, 0, "cores"),
        (5, 0, "sigma"),
        (6, 0, "left, right"),
        (7, 0, "left, right"),
        (8, 0, "info"),
        (9, 0, "workspace"),
        (10, 2 * each - 1, "workspace"),
        (11, -1, "shared_limit"),
        (11, 10, "shared_limit"),
    )
    check_refusals(emulated_cuda.jacobi_svd, call, cases)
    with pytest.raises(ValueError, match="r: got 129, expected 0 to 128"):
        emulated_cuda.jacobi_workspace(129, True, 0)


# ---- Cholesky


def gram_of(factor: Tensor) -> Tensor:
    return (factor.mT @ factor).contiguous()


@pytest.mark.parametrize("r", [1, 2, 7, 16, 17, 33, 70])
def test_roots_of_gram_matrices(r):
    factors = torch.randn(4, 90, r, dtype=F64)
    factors[3] = torch.eye(90, r)  # whose root has more zeros than a triangle
    factors *= torch.logspace(-9, 9, r, dtype=F64)
    factors[1, :, r // 2] = 0.0
    factors[2, :, r - 1] = 3.0 * factors[2, :, 0] if r > 1 else 0.0
    root, inverse, norms = cuda.gram_roots(gram_of(factors))
    D = torch.diag_embed(norms)
    unit = factors / norms.clamp(min=1e-300)[:, None]
    difference = (root @ D).mT @ (root @ D) - gram_of(factors)
    assert difference.abs().max() <= SVD_BOUNDS_64[3] * norms.amax() ** 2
    assert (root.mT @ root - gram_of(unit)).abs().max() <= SVD_BOUNDS_64[3]
    for i, rank in enumerate((r, r - 1, r - 1, r)):
        Q = factors[i] @ inverse[i]
        assert not root[i, rank:].any() and not Q[:, rank:].any()
        wanted = torch.eye(rank, dtype=F64)
        assert (Q[:, :rank].T @ Q[:, :rank] - wanted).norm() <= r * SVD_BOUNDS_64[2]
        # Zero at the pivots of the rows before, so that in each row a column ends: its pivot's.
        # What rounding makes zero besides is no property: a pivot is none of it.
        rows = torch.arange(1, r + 1)[:, None]
        last = (rows * (root[i] != 0)).amax(0)
        assert set(range(1, rank + 1)) <= set(last.tolist())
        assert (root[i].abs().amax(1) == root[i].amax(1))[:rank].all()  # pivots are positive


def test_no_bit_of_a_root_depends_on_where_a_row_lies(emulated_cuda):
    grams = gram_of(torch.randn(2, 100, 72, dtype=F64))
    wanted = cuda.gram_roots(grams)
    for limit in (64 * KIB, 48 * KIB, 8 * KIB):
        assert emulated_cuda.jacobi_workspace(72, True, limit) > 0
        got = cuda.gram_roots(grams, limit)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True)), limit
    for schedule in (1, 2, 3):
        with scheduled(emulated_cuda, schedule):
            got = cuda.gram_roots(grams)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_gram_matrices_that_do_not_fit_are_refused(emulated_cuda):
    for wrong in (torch.zeros(3, 3, dtype=F64), torch.zeros(1, 3, 3)):
        with pytest.raises(ValueError, match=r"^grams: expected .* got "):
            cuda.gram_roots(wrong)
    r, limit = 70, 60 * KIB
    square, norms = torch.zeros(1, r, r, dtype=F64), torch.zeros(1, r, dtype=F64)
    others = torch.zeros(2, r, r, dtype=F64)
    each = emulated_cuda.jacobi_workspace(r, True, limit)
    workspace = torch.zeros(each, dtype=F64)
    pointers = [t.data_ptr() for t in (square, *others, norms, workspace)]
    cases = (
        (1, -1, "count"),
        (2, 129, "r: got 129"),
        (3, 0, "grams"),
        (4, 0, "roots"),
        (5, 0, "inverses"),
        (6, 0, "norms"),
        (7, 0, "workspace"),
        (8, each - 1, "workspace"),
    )
    check_refusals(emulated_cuda.gram_roots, [0, 1, r, *pointers, each, limit], cases)


# ---- the op

EDGES = edge_cases((4, 9, 33), (math.nan, math.inf), count=4)


@pytest.mark.parametrize(("shape", "dtype"), thinned(SHAPES, [F32, BF16, F16]))
def test_shapes(shape, dtype):
    check_shape(*shape, dtype)
    assert peftkern.stats().calls == {("low_rank_svd", "cuda"): 2}


def test_largest_rank():
    B, A = torch.randn(130, 128).bfloat16(), torch.randn(128, 140)
    check(low_rank_svd(B, A), B, A)


@pytest.mark.parametrize(
    ("r", "kappa"), thinned([2, 16, 33, 66], [1, 1e2, 1e4, 9e4, 3e5, 1e6, 1e8])
)
def test_condition_numbers(r, kappa):
    check_condition(200, 150, r, kappa)


@pytest.mark.parametrize("kappa", [1e3, 1e6])
def test_one_graded_factor(kappa):
    check_one_graded_factor(kappa)


@pytest.mark.parametrize("edge", EDGES)
def test_edges(edge):
    EDGES[edge]()


def test_ragged_lists():
    check_list(*ragged(15))


def test_bit_identical():
    check_equal_bits(6)


def test_same_signs_as_the_cpu_back_end():
    check_signs_of_the_cpu()


def test_unconverged_pairs_reach_info(monkeypatch):
    monkeypatch.setattr(cuda, "JACOBI_SWEEPS", 1)
    svd = low_rank_svd(torch.randn(50, 20), torch.randn(20, 40))
    assert int(svd.info) > 0 and torch.isfinite(svd.U).all()


@pytest.mark.parametrize(
    ("r", "dtype", "reason"),
    [(129, F32, "the rank is 129, more than 128"), (2, F64, r"the dtype is torch\.float64")],
)
def test_what_is_not_supported_is_said(r, dtype, reason):
    with pytest.raises(BackendUnavailableError, match=reason):
        low_rank_svd(torch.randn(140, r, dtype=dtype), torch.randn(r, 150))
