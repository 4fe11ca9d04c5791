"""The SVD of low-rank updates against a dense SVD in float64, and what is built on it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cases import BF16, F16, F32, F64, layouts
from tolerances import (
    DETERMINISM_RUNS,
    FUZZ_SVD_EXAMPLES,
    SVD_BOUNDS,
    SVD_BOUNDS_64,
    SVD_BOUNDS_FAST,
    SVD_SIGMA_FROM,
    SVD_STATS_RTOL,
)
from torch import Tensor

import peftkern
from peftkern.backends.cpu import low_rank_svd as cpu
from peftkern.functional.low_rank_svd import (
    LowRankSVD,
    allocate_rank,
    low_rank_svd,
    low_rank_svdvals,
    merge_lora,
    spectral_stats,
    truncate_lora,
)

SHAPES = [  # m, n, r: one, odd, primes, more rank than rows or columns, beyond Jacobi's ranks
    (1, 1, 1),
    (5, 3, 1),
    (40, 30, 2),
    (130, 70, 3),
    (64, 64, 16),
    (301, 97, 17),
    (1100, 300, 8),
    (90, 1030, 33),
    (7, 40, 12),
    (40, 5, 12),
    (80, 90, 66),
]
FLOAT32_STEP = 2.0**-149  # between its numbers below 2^-126
NAMES = ("sigma", "relative sigma", "orthogonality", "reconstruction")


def orthonormal(rows: int, columns: int) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, dtype=F64))[0]


def graded(m: int, n: int, r: int, kappa: float) -> tuple[Tensor, Tensor]:
    """Factors whose condition numbers are kappa, in float64."""
    sigma = torch.logspace(0, -math.log10(kappa), r, dtype=F64)
    B, At = ((orthonormal(size, r) * sigma) @ orthonormal(r, r) for size in (m, n))
    return B, At.T.contiguous()


def svd_errors(svd: LowRankSVD, B: Tensor, A: Tensor, scaling: float = 1.0) -> tuple[float, ...]:
    """Errors against the dense SVD in float64, in the order of NAMES."""
    dense = scaling * (B.double() @ A.double())
    U, S, Vh = (tensor.double() for tensor in svd[:3])
    rank = int(svd.rank)
    sigma = torch.linalg.svdvals(dense)[: len(S)]
    top = sigma[0]
    large = sigma >= SVD_SIGMA_FROM * top
    unit = torch.eye(rank, dtype=F64)
    products = (U[:, :rank].T @ U[:, :rank] - unit, Vh[:rank] @ Vh[:rank].T - unit)
    assert torch.all(S[:-1] >= S[1:])
    assert not S[rank:].any() and not U[:, rank:].any() and not Vh[rank:].any()
    return (
        ((S - sigma).abs().max() / top).item(),
        ((S - sigma).abs() / sigma)[large].max().item(),
        max(product.abs().max().item() for product in products),
        ((U * S @ Vh - dense).norm() / dense.norm()).item(),
    )


def check(
    svd: LowRankSVD,
    B: Tensor,
    A: Tensor,
    scaling: float = 1.0,
    bounds: tuple[float, ...] = SVD_BOUNDS,
) -> None:
    k = min(*B.shape, A.shape[1])
    dtype = F64 if F64 in (B.dtype, A.dtype) else F32
    assert [t.shape for t in svd[:3]] == [(B.shape[0], k), (k,), (k, A.shape[1])]
    assert {t.dtype for t in svd[:3]} == {dtype}
    assert int(svd.info) == 0
    for name, error, bound in zip(NAMES, svd_errors(svd, B, A, scaling), bounds, strict=True):
        assert error <= bound, f"{name}: {error:.2e} > {bound:.0e}"


def equal(one: LowRankSVD, other: LowRankSVD) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def of_layer(svd: LowRankSVD, layer: int) -> LowRankSVD:
    return LowRankSVD(*(column[layer] for column in svd))


# ---- accuracy


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(every_backend, shape, dtype):
    m, n, r = shape
    B, A = torch.randn(m, r).to(dtype), torch.randn(r, n).to(dtype)
    svd = low_rank_svd(B, A, -1.5)
    check(svd, B, A, -1.5)
    assert int(svd.rank) == min(m, n, r)


@pytest.mark.parametrize("kappa", [1, 1e1, 1e2, 1e3, 1e4, 9e4, 1e5, 3e5, 1e6])
@pytest.mark.parametrize("r", [2, 7, 16, 33, 66])
def test_condition_numbers(every_backend, r, kappa):
    B, A = (factor.float() for factor in graded(400, 350, r, kappa))
    check(low_rank_svd(B, A, 0.5), B, A, 0.5)
    if kappa <= 1e4:
        check(low_rank_svd(B, A, mode="fast"), B, A, bounds=SVD_BOUNDS_FAST)


@pytest.mark.parametrize("kappa", [1, 1e3, 1e6])
def test_one_graded_factor(every_backend, kappa):
    """Also the small values keep their digits where only one factor has a large range."""
    B, A = graded(300, 200, 16, kappa)
    B, A = B.float(), torch.randn(16, 200)
    check(low_rank_svd(B, A), B, A)


@pytest.mark.parametrize("scales", list(itertools.product((1e-20, 1.0, 1e20), repeat=2)))
def test_scales(every_backend, scales):
    """Against the same factors at scale one: float32 powers of two would be exact, these round."""
    B, A = torch.randn(60, 5) * scales[0], torch.randn(5, 50) * scales[1]
    scaling = 1 / math.prod(scales)
    check(low_rank_svd(B, A, scaling), B, A, scaling)


def test_lengths_traded_between_columns_and_rows(every_backend):
    """Column l of B times row l of A is what counts, not how long either is."""
    B, A = torch.randn(60, 6), torch.randn(6, 50)
    trade = 2.0 ** torch.tensor([-60.0, 40.0, -20.0, 0.0, 30.0, 60.0])
    svd, traded = low_rank_svd(B, A), low_rank_svd(B * trade, A / trade[:, None])
    assert int(traded.rank) == 6
    check(traded, B, A)
    assert torch.equal(svd.rank, traded.rank)


OUTSIDE = {  # what B, A and the scaling are multiplied by; too large and too small for float32
    "factors of 1e25": (1e25, 1e25, 1.0),
    "scaling of 1e60": (1.0, 1e-10, 1e60),
    "factors of 1e-25": (1e-25, 1e-25, 1.0),
    "scaling of 1e-60": (1.0, 1e10, 1e-60),
    "subnormal products": (1e-20, 1e-20, 0.1),
    "beyond float64": (1e30, 1e30, 1e280),
    "below float64": (1e-30, 1e-30, 1e-280),
}


@pytest.mark.parametrize("r", [4, 66])
def test_singular_values_outside_float32_are_reported(every_backend, r):
    check_outside(r)


def check_outside(r: int) -> None:
    """Info says so, of these pairs alone; rank and vectors are right all the same."""
    pairs = [(torch.randn(90, r), torch.randn(r, 80)) for _ in OUTSIDE]
    scales = list(OUTSIDE.values())
    Bs = [B * b for (B, _), (b, _, _) in zip(pairs, scales, strict=True)]
    As = [A * a for (_, A), (_, a, _) in zip(pairs, scales, strict=True)]
    Bs, As, scaling = [pairs[0][0], *Bs], [pairs[0][1], *As], [0.5, *(s for _, _, s in scales)]
    svd = low_rank_svd(Bs, As, scaling)
    assert svd.info.tolist() == [0] + [-2] * len(scales)
    assert svd.rank.tolist() == [r] * len(Bs)
    for i, (b, a, s) in enumerate(scales, 1):
        B, A = Bs[i].double() / b, As[i].double() / a
        sigma = torch.linalg.svdvals(B @ A)[:r]
        assert max(svd_errors(of_layer(svd, i)._replace(S=sigma), B, A)) <= max(SVD_BOUNDS[2:])
        size = math.log10(b) + math.log10(a) + math.log10(s)
        if size > 0:
            assert torch.isinf(svd.S[i]).all()
        else:
            assert ((svd.S[i] - sigma * 10.0 ** max(size, -300)).abs() <= FLOAT32_STEP).all()
    assert all(map(torch.equal, low_rank_svdvals(Bs, As, scaling), svd.S))


@pytest.mark.parametrize("scaling", [2.0**-126, 1e-37, 1e38, 2.0**127])
def test_singular_values_at_the_ends_of_float32_are_none_of_these(every_backend, scaling):
    """Orthonormal columns: every singular value is the scaling."""
    U, V = orthonormal(60, 5).float(), orthonormal(50, 5).float()
    svd = low_rank_svd(U, V.T, 1.001 * scaling)
    assert int(svd.info) == 0
    check(svd._replace(S=svd.S / scaling), U, V.T, 1.001)


def test_values_that_rounded_to_zero_still_count(every_backend):
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


@pytest.mark.parametrize("r", [1, 4, 66])
def test_zero_factors(every_backend, r):
    B, A = torch.zeros(30, r), torch.randn(r, 20)
    for svd in (
        low_rank_svd(B, A),
        low_rank_svd(A.T, B.T),
        low_rank_svd(A.T, A, 0.0),
        low_rank_svd(B, torch.zeros(r, 20)),
    ):
        assert int(svd.rank) == 0 and int(svd.info) == 0
        assert not any(tensor.any() for tensor in svd[:3])


def test_no_rank_rows_or_columns(every_backend):
    for m, n, r in [(3, 4, 0), (0, 4, 2), (3, 0, 2), (0, 0, 0)]:
        svd = low_rank_svd(torch.randn(m, r), torch.randn(r, n))
        assert [t.shape for t in svd[:3]] == [(m, 0), (0,), (0, n)]
        assert int(svd.rank) == 0 and int(svd.info) == 0


@pytest.mark.parametrize("r", [4, 9, 66])
def test_repeated_sigma(every_backend, r):
    """Single vectors of a repeated value mean nothing: their subspace does."""
    sigma = torch.ones(r, dtype=F64)
    sigma[r // 2 :] = 0.25
    U, V = orthonormal(90, r), orthonormal(80, r)
    B, A = (U * sigma.sqrt()).float(), (V * sigma.sqrt()).T.float()
    svd = low_rank_svd(B, A)
    check(svd, B, A)
    for got, want in ((svd.U.double(), U), (svd.Vh.T.double(), V)):
        for group in (slice(0, r // 2), slice(r // 2, r)):
            difference = got[:, group] @ got[:, group].T - want[:, group] @ want[:, group].T
            assert difference.abs().max() <= SVD_BOUNDS[2]


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_dependent_columns(every_backend, dtype):
    B, A = torch.randn(70, 10).to(dtype), torch.randn(10, 60).to(dtype)
    B[:, 3], B[:, 7], A[4], A[5] = B[:, 1], -2 * B[:, 1], A[0], 0.0
    svd = low_rank_svd(B, A)
    check(svd, B, A)
    assert int(svd.rank) == torch.linalg.matrix_rank(B.double() @ A.double())
    B[:, 1:] = B[:, :1]
    svd = low_rank_svd(B, A)
    check(svd, B, A)
    assert int(svd.rank) == 1


def test_factors_that_cancel(every_backend):
    B, A = torch.randn(50, 4), torch.randn(4, 30)
    B[:, 1], A[1] = B[:, 0], -A[0]
    svd = low_rank_svd(B, A)
    check(svd, B, A)
    assert int(svd.rank) == 2
    svd = low_rank_svd(B[:, :2], A[:2])
    assert int(svd.rank) == 0 and not svd.S.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["lora_B", "lora_A", "scaling"])
def test_nan_and_inf(every_backend, where, bad):
    """One bad value makes its pair NaN and leaves the others, those of its vector lanes too."""
    Bs, As = [torch.randn(40, 5) for _ in range(11)], [torch.randn(5, 30) for _ in range(11)]
    scaling = [1.0] * 11
    wanted = low_rank_svd(Bs, As, scaling)
    if where == "scaling":
        scaling[3] = bad
    else:
        {"lora_B": Bs, "lora_A": As}[where][3][2, 4] = bad
    svd = low_rank_svd(Bs, As, scaling)
    assert svd.info.tolist() == [0] * 3 + [-1] + [0] * 7
    assert int(svd.rank[3]) == 0
    assert all(tensor.isnan().all() for tensor in of_layer(svd, 3)[:3])
    assert all(equal(of_layer(svd, i), of_layer(wanted, i)) for i in range(11) if i != 3)


def test_nan_beyond_jacobis_ranks(every_backend):
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


@settings(max_examples=FUZZ_SVD_EXAMPLES)
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


# ---- lists, layouts, threads


def ragged(count: int = 30) -> tuple[list[Tensor], list[Tensor], list[float]]:
    torch.manual_seed(7)
    sizes = [(3 + 37 * i % 90, 2 + 53 * i % 71, 1 + i % 5 * 4) for i in range(count)]
    dtypes = itertools.cycle([(F32, F32), (BF16, F32), (F16, BF16)])
    Bs, As = [], []
    for (m, n, r), (B_dtype, A_dtype) in zip(sizes, dtypes, strict=False):
        Bs.append(torch.randn(m, r).to(B_dtype))
        As.append(torch.randn(r, n).to(A_dtype))
    return Bs, As, [0.5 + i for i in range(count)]


def test_ragged_lists_equal_single_pairs(every_backend):
    Bs, As, scaling = ragged()
    svd = low_rank_svd(Bs, As, scaling)
    values = low_rank_svdvals(Bs, As, scaling)
    for i, (B, A) in enumerate(zip(Bs, As, strict=True)):
        single = low_rank_svd(B, A, scaling[i])
        check(single, B, A, scaling[i])
        assert equal(single, of_layer(svd, i))
        assert torch.equal(values[i], single.S)
        assert torch.equal(low_rank_svdvals(B, A, scaling[i]), single.S)
    assert svd.rank.dtype is svd.info.dtype is torch.int64


def test_empty_list(every_backend):
    svd = low_rank_svd([], [])
    assert svd[:3] == ([], [], [])
    assert svd.rank.shape == svd.info.shape == (0,) and svd.rank.dtype is torch.int64
    assert low_rank_svdvals([], []) == []


def test_layouts(every_backend):
    B, A = torch.randn(40, 6), torch.randn(6, 50)
    wanted = low_rank_svd(B, A)
    for (name, b), a in zip(layouts(B).items(), layouts(A).values(), strict=True):
        if b.dim() == 2:
            assert equal(low_rank_svd(b, a), wanted), name
    expanded = torch.randn(40, 1).expand(40, 6)
    assert int(low_rank_svd(expanded, A).rank) == 1


@pytest.mark.parametrize("r", [3, 16, 32])
def test_bits_do_not_depend_on_threads(every_backend, r):
    if every_backend == "reference":
        pytest.skip(
            "no code of ours: the reference is torch's LAPACK, whose bits may depend on its threads"
        )
    Bs, As = [torch.randn(3000, r), torch.randn(70, r)], [torch.randn(r, 2500), torch.randn(r, 9)]
    Bs.append(graded(2100, 50, r, 1e6)[0].float())  # a second pass
    As.append(torch.randn(r, 4100))
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            runs.append(low_rank_svd(Bs, As))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(equal(of_layer(run, i), of_layer(runs[0], i)) for i in range(3))


def test_bit_identical(every_backend):
    Bs, As, scaling = ragged(12)
    first = low_rank_svd(Bs, As, scaling)
    for _ in range(DETERMINISM_RUNS - 1):
        again = low_rank_svd(Bs, As, scaling)
        assert all(equal(of_layer(first, i), of_layer(again, i)) for i in range(12))


def test_inputs_are_left_alone_and_nothing_has_a_gradient(every_backend):
    B, A = torch.randn(30, 4, requires_grad=True), torch.randn(4, 20, requires_grad=True)
    before = B.detach().clone(), A.detach().clone()
    svd = low_rank_svd(B, A)
    assert not any(tensor.requires_grad for tensor in svd)
    assert torch.equal(B, before[0]) and torch.equal(A, before[1])
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
    cores, inverse, *_ = cpu.low_rank_cores([B0], [A0], 2, [1.0], True)
    rank, out = torch.tensor([2]), torch.empty(12)
    good = {"U": out, "U_offsets": [0], "Vh": torch.empty(10), "Vh_offsets": [0]}
    for change, message in [
        ({"U": torch.empty(11)}, "u: expected room for 12 values from offset 0 on, got 11"),
        ({"Vh_offsets": [1]}, "vh: expected room for 10"),
        ({"U_offsets": [-1]}, "u: expected room"),
        ({"U_offsets": []}, "expected one for each pair"),
    ]:
        with pytest.raises(ValueError, match=message):
            cpu.low_rank_rotate([B0], [A0], 2, inverse, cores, cores, rank, **(good | change))
    with pytest.raises(ValueError, match="rank: expected -1 to"):
        cpu.low_rank_rotate([B0], [A0], 2, inverse, cores, cores, torch.tensor([3]), *good.values())
    with pytest.raises(ValueError, match="lora_B: expected 18 contiguous"):
        cpu.low_rank_cores([B0], [A0], 3, [1.0], True)
    with pytest.raises(ValueError, match="cores: expected"):
        cpu.jacobi_svd(cores.float(), 30, True)


# ---- statistics, budgets, truncation, merging


def test_spectral_stats():
    flat, steep, zero = torch.ones(4), torch.tensor([2.0, 1.0, 0.0]), torch.zeros(3)
    energy, stable, effective = spectral_stats([flat, steep, zero, torch.zeros(0)])
    entropy = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    for got, want in [
        (energy, [4.0, 5.0, 0.0, 0.0]),
        (stable, [4.0, 1.25, 0.0, 0.0]),
        (effective, [4.0, math.exp(entropy), 0.0, 0.0]),
    ]:
        assert torch.allclose(got, torch.tensor(want, dtype=F64), rtol=SVD_STATS_RTOL)
    assert torch.allclose(spectral_stats(steep).effective_rank, effective[1])
    assert [t.shape for t in spectral_stats([])] == [(0,)] * 3
    with pytest.raises(ValueError, match=r"S: expected \[k\], layer 1"):
        spectral_stats([flat, flat[None]])


def test_energy_needs_no_svd():
    B, A = torch.randn(40, 5), torch.randn(5, 30)
    energy = spectral_stats(low_rank_svd(B, A, 3.0).S).energy
    assert torch.allclose(energy, (3 * B.double() @ A.double()).square().sum(), rtol=SVD_BOUNDS[0])


def best_energy(S: list[Tensor], budget: float, cost: list[float], low: int, high: int) -> float:
    """The largest energy over all allocations."""
    choices = itertools.product(*(range(low, min(high, len(s)) + 1) for s in S))
    affordable = (c for c in choices if sum(k * p for k, p in zip(c, cost, strict=True)) <= budget)
    return max(
        sum(s[:k].square().sum().item() for s, k in zip(S, c, strict=True)) for c in affordable
    )


layers = st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 7.0]), max_size=4), max_size=4)


@given(layers, st.integers(0, 12), st.integers(0, 2), st.integers(1, 4))
def test_allocate_rank_is_optimal(values, budget, low, high):
    S = [torch.tensor(sorted(v, reverse=True), dtype=F64) for v in values]
    lows = [min(low, high, len(s)) for s in S]
    if sum(lows) > budget:
        with pytest.raises(ValueError, match=f"budget: expected at least {sum(lows)}"):
            allocate_rank(S, budget, r_min=lows, r_max=high)
        return
    ranks = allocate_rank(S, budget, r_min=lows, r_max=high)
    assert sum(ranks) <= budget
    assert all(lo <= k <= high for lo, k in zip(lows, ranks, strict=True))
    got = sum(s[:k].square().sum().item() for s, k in zip(S, ranks, strict=True))
    choices = itertools.product(
        *(range(lo, min(high, len(s)) + 1) for lo, s in zip(lows, S, strict=True))
    )
    best = max(
        sum(s[:k].square().sum().item() for s, k in zip(S, c, strict=True))
        for c in choices
        if sum(c) <= budget
    )
    assert got == best


@given(layers, st.integers(0, 40), st.data())
def test_allocate_rank_with_cost_misses_one_component_at_most(values, budget, data):
    S = [torch.tensor(sorted(v, reverse=True), dtype=F64) for v in values]
    cost = [data.draw(st.integers(1, 9)) for _ in S]
    ranks = allocate_rank(S, budget, cost=cost)
    assert sum(k * c for k, c in zip(ranks, cost, strict=True)) <= budget
    got = sum(s[:k].square().sum().item() for s, k in zip(S, ranks, strict=True))
    largest = max((s[0].item() ** 2 for s in S if len(s)), default=0.0)
    assert got + largest >= best_energy(S, budget, cost, 0, 4)


@pytest.mark.parametrize("scale", [1e-250, 1e-30, 1e30, 1e250])
def test_allocate_rank_does_not_depend_on_the_scale(scale):
    S = [torch.tensor(values, dtype=F64) for values in ([3.0, 1.0], [2.5, 2.0], [0.5, 0.0])]
    costs = [1.0, 1.5, 0.25]
    for budget in (1, 2, 3, 4.25, 100):
        wanted = allocate_rank(S, budget, cost=costs)
        assert allocate_rank([sigma * scale for sigma in S], budget, cost=costs) == wanted


@pytest.mark.parametrize("scale", [1e-250, 1e250])
def test_stats_of_values_whose_squares_are_beyond_float64(scale):
    S = torch.tensor([3.0, 2.0, 1.0], dtype=F64)
    stats, ordinary = spectral_stats(S * scale), spectral_stats(S)
    assert stats.energy == (math.inf if scale > 1 else 0.0)
    for got, wanted in zip(stats[1:], ordinary[1:], strict=True):
        assert got.item() == pytest.approx(wanted.item(), rel=SVD_STATS_RTOL)
    stats = spectral_stats(torch.tensor([math.inf, 1.0]))
    assert stats.energy == math.inf and stats.stable_rank.isnan() and stats.effective_rank.isnan()


def test_allocate_rank_ties_and_zeros():
    S = [torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.0]), torch.tensor([1.0])]
    assert allocate_rank(S, 2) == [2, 0, 0]
    assert allocate_rank(S, 100) == [2, 1, 1]
    assert allocate_rank(S, 100, r_min=[0, 2, 0]) == [2, 2, 1]
    assert allocate_rank([], 3) == []


@pytest.mark.parametrize(
    ("S", "kwargs", "message"),
    [
        ([torch.tensor([1.0, math.nan])], {}, "S: expected finite .* layer 0 holds NaN or Inf"),
        ([torch.tensor([math.inf, 1.0])], {}, "S: expected finite .* layer 0 holds NaN or Inf"),
        ([torch.tensor([1.0, 2.0])], {}, "S: expected descending values, those of layer 0"),
        ([torch.ones(2)], {"cost": [0.0]}, "cost: expected positive numbers, layer 0 has 0.0"),
        ([torch.ones(2)], {"cost": [1.0, 1.0]}, "cost: expected 1 numbers, got 2"),
        ([torch.ones(2)], {"r_min": 3}, "r_min, r_max: .*layer 0 has 3 and 2"),
        ([torch.ones(2)], {"r_min": -1}, "r_min, r_max"),
        ([torch.ones(2)] * 3, {"r_min": 1}, "budget: expected at least 3, r_min's cost, got 2"),
    ],
)
def test_allocate_rank_bad_arguments(S, kwargs, message):
    with pytest.raises(ValueError, match=message):
        allocate_rank(S, 2, **kwargs)


@pytest.mark.parametrize("form", ["balanced", "adalora"])
def test_truncate_is_the_best_approximation(every_backend, form):
    Bs, As = [torch.randn(40, 6), torch.randn(30, 6)], [torch.randn(6, 50), torch.randn(6, 20)]
    ranks = [3, 0]
    svd = low_rank_svd(Bs, As, 2.0)
    for i, factors in enumerate(truncate_lora(svd, ranks, form)):
        dense = 2.0 * Bs[i].double() @ As[i].double()
        U, S, Vh = torch.linalg.svd(dense, full_matrices=False)
        best = (U[:, : ranks[i]] * S[: ranks[i]]) @ Vh[: ranks[i]]
        if form == "adalora":
            B, E, A = (tensor.double() for tensor in factors)
            assert E.shape == (ranks[i], 1)
            got = B @ (E * A)
        else:
            B, A = (tensor.double() for tensor in factors)
            got = B @ A
            assert torch.allclose(B.norm(dim=0), A.norm(dim=1), rtol=SVD_BOUNDS[2])
        assert (got - best).norm() <= SVD_BOUNDS[3] * dense.norm()
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in factors)
    single = truncate_lora(low_rank_svd(Bs[0], As[0]), 2, form)
    assert single.lora_B.shape == (40, 2) and single.lora_A.shape == (2, 50)


def test_truncate_bad_arguments():
    svd = low_rank_svd(B0, A0)
    with pytest.raises(ValueError, match=r"form: expected one of .*got 'dense'"):
        truncate_lora(svd, 1, "dense")
    with pytest.raises(ValueError, match="ranks: expected 0 to 2, layer 0 has 3"):
        truncate_lora(svd, 3)
    with pytest.raises(ValueError, match="ranks: expected 1 numbers, got 2"):
        truncate_lora(svd, [1, 1])


def test_merge_equals_the_dense_sum(every_backend):
    adapters = [(torch.randn(40, r).to(d), torch.randn(r, 30)) for r, d in ((4, F32), (7, BF16))]
    weights = [0.75, -2.0]
    dense = sum(w * (B.double() @ A.double()) for w, (B, A) in zip(weights, adapters, strict=True))
    svd = merge_lora(adapters, weights)
    assert len(svd.S) == 11
    got = (svd.U.double() * svd.S.double()) @ svd.Vh.double()
    assert (got - dense).norm() <= SVD_BOUNDS[3] * dense.norm()
    lists = merge_lora([([B, B], [A, 2 * A]) for B, A in adapters], weights)
    assert equal(of_layer(lists, 0), svd)
    assert torch.allclose(lists.S[1], 2 * svd.S, rtol=SVD_BOUNDS[0])


@pytest.mark.parametrize("weight", [1e-30, 1e30, -1e38])
def test_merge_with_any_weights(every_backend, weight):
    """Weights and factors that are none together in float32; their product is."""
    adapters = [(torch.randn(40, 4), torch.randn(4, 30)), (torch.randn(40, 3), torch.randn(3, 30))]
    for power in (0.0, 0.5):  # of the size of A
        size = abs(1.0 / weight)
        scaled = [(B * size ** (1 - power), A * size**power) for B, A in adapters]
        for pairs in (scaled, [(A.T, B.T) for B, A in scaled]):
            dense = sum(weight * (B.double() @ A.double()) for B, A in pairs)
            svd = merge_lora(pairs, [weight, weight])
            got = (svd.U.double() * svd.S.double()) @ svd.Vh.double()
            assert int(svd.info) == 0 and (got - dense).norm() <= SVD_BOUNDS[3] * dense.norm()
    assert int(merge_lora(adapters, [0.0, 0.0]).rank) == 0
    assert int(merge_lora(adapters, [math.inf, 1.0]).info) == -1


def test_merge_of_opposites_is_zero(every_backend):
    B, A = torch.randn(20, 3), torch.randn(3, 30)
    svd = merge_lora([(B, A), (B, A)], [1.0, -1.0])
    assert int(svd.rank) == 0


def test_merge_bad_arguments():
    for adapters, weights, error, message in [
        ([], None, ValueError, "adapters: expected at least one"),
        ([B0], None, TypeError, r"adapters: expected pairs .*number 0"),
        ([(B0, A0), (B0[1:], A0)], None, ValueError, "adapters: expected one m x n in layer 0"),
        ([(B0, A0), ([B0], [A0])], None, ValueError, "adapters: expected the same layers"),
        ([([B0], [A0]), ([], [])], None, ValueError, "adapters: expected the same layers"),
        ([(B0, A0)], [1.0, 2.0], ValueError, "weights: expected 1 numbers, got 2"),
    ]:
        with pytest.raises(error, match=message):
            merge_lora(adapters, weights)
