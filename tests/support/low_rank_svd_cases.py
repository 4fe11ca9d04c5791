"""Low-rank SVDs against a dense SVD in float64: the checks that hold on every back end."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable

import torch
from linear_cases import BF16, F16, F32, F64, layouts
from tolerances import DETERMINISM_RUNS, SVD_BOUNDS, SVD_BOUNDS_64, SVD_BOUNDS_FAST, SVD_SIGMA_FROM
from torch import Tensor

import peftkern
from peftkern.functional.low_rank_svd import LowRankSVD, low_rank_svd, low_rank_svdvals

SHAPES = [  # m, n, r: one, odd, primes, more rank than rows or columns, beyond Triton's ranks
    (1, 1, 1),
    (5, 3, 1),
    (40, 30, 2),
    (130, 70, 3),
    (64, 64, 16),
    (301, 97, 17),
    (90, 1030, 33),
    (7, 40, 12),
    (40, 5, 12),
    (80, 90, 66),
]
SCALES = list(itertools.product((1e-20, 1.0, 1e20), repeat=2))
OUTSIDE = {  # what B, A and the scaling are multiplied by; too large and too small for float32
    "factors of 1e25": (1e25, 1e25, 1.0),
    "scaling of 1e60": (1.0, 1e-10, 1e60),
    "factors of 1e-25": (1e-25, 1e-25, 1.0),
    "scaling of 1e-60": (1.0, 1e10, 1e-60),
    "subnormal products": (1e-20, 1e-20, 0.1),
    "beyond float64": (1e30, 1e30, 1e280),
    "below float64": (1e-30, 1e-30, 1e-280),
}
FLOAT32_STEP = 2.0**-149  # between its numbers below 2^-126
NAMES = ("sigma", "relative sigma", "orthogonality", "reconstruction")


def orthonormal(rows: int, columns: int) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, dtype=F64))[0]


def power_law(m: int, n: int, decay: float) -> Tensor:
    """A matrix whose singular values are i^-decay."""
    k = min(m, n)
    sigma = torch.arange(1, k + 1, dtype=F64) ** -decay
    return ((orthonormal(m, k) * sigma) @ orthonormal(n, k).T).float()


def graded(m: int, n: int, r: int, kappa: float) -> tuple[Tensor, Tensor]:
    """Factors whose condition numbers are kappa, in float64."""
    sigma = torch.logspace(0, -math.log10(kappa), r, dtype=F64)
    B, At = ((orthonormal(size, r) * sigma) @ orthonormal(r, r) for size in (m, n))
    return B, At.T.contiguous()


def ragged(count: int = 30) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """Five ranks, three dtypes, every pair of other lengths."""
    torch.manual_seed(7)
    sizes = [(3 + 37 * i % 90, 2 + 53 * i % 71, 1 + i % 5 * 4) for i in range(count)]
    dtypes = itertools.cycle([(F32, F32), (BF16, F32), (F16, BF16)])
    Bs, As = [], []
    for (m, n, r), (B_dtype, A_dtype) in zip(sizes, dtypes, strict=False):
        Bs.append(torch.randn(m, r).to(B_dtype))
        As.append(torch.randn(r, n).to(A_dtype))
    return Bs, As, [0.5 + i for i in range(count)]


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


def on_cpu(svd: LowRankSVD) -> LowRankSVD:
    return LowRankSVD(*(tensor.cpu() for tensor in svd))


def check_shape(m: int, n: int, r: int, *dtypes: torch.dtype) -> None:
    B, A = torch.randn(m, r).to(dtypes[0]), torch.randn(r, n).to(dtypes[-1])
    svd = low_rank_svd(B, A, -1.5)
    check(svd, B, A, -1.5)
    assert int(svd.rank) == min(m, n, r)
    assert torch.equal(low_rank_svdvals(B, A, -1.5), svd.S)


def check_condition(m: int, n: int, r: int, kappa: float) -> None:
    B, A = (factor.float() for factor in graded(m, n, r, kappa))
    check(low_rank_svd(B, A, 0.5), B, A, 0.5)
    if kappa <= 1e4:
        check(low_rank_svd(B, A, mode="fast"), B, A, bounds=SVD_BOUNDS_FAST)


def check_one_graded_factor(kappa: float) -> None:
    """The small values keep their digits where only one factor has a large range, too."""
    B, A = graded(300, 200, 16, kappa)[0].float(), torch.randn(16, 200)
    check(low_rank_svd(B, A), B, A)


# ---- edges: what holds at any size


def scales(b: float, a: float) -> None:
    """Against the same factors at scale one: float32 powers of two would be exact, these round."""
    B, A = torch.randn(60, 5) * b, torch.randn(5, 50) * a
    scaling = 1 / math.prod((b, a))
    check(low_rank_svd(B, A, scaling), B, A, scaling)


def lengths_traded_between_columns_and_rows() -> None:
    """Column l of B times row l of A is what counts, not how long either is."""
    B, A = torch.randn(60, 6), torch.randn(6, 50)
    trade = 2.0 ** torch.tensor([-60.0, 40.0, -20.0, 0.0, 30.0, 60.0])
    traded = low_rank_svd(B * trade, A / trade[:, None])
    assert int(traded.rank) == 6
    check(traded, B, A)


def singular_values_outside_float32_are_reported(r: int, names: Iterable[str] = OUTSIDE) -> None:
    """Info says so, of these pairs alone; rank and vectors are right all the same."""
    factors = [OUTSIDE[name] for name in names]
    pairs = [(torch.randn(90, r), torch.randn(r, 80)) for _ in factors]
    Bs = [B * b for (B, _), (b, _, _) in zip(pairs, factors, strict=True)]
    As = [A * a for (_, A), (_, a, _) in zip(pairs, factors, strict=True)]
    Bs, As, scaling = [pairs[0][0], *Bs], [pairs[0][1], *As], [0.5, *(s for _, _, s in factors)]
    svd = low_rank_svd(Bs, As, scaling)
    assert svd.info.tolist() == [0] + [-2] * len(factors)
    assert svd.rank.tolist() == [r] * len(Bs)
    for i, (b, a, s) in enumerate(factors, 1):
        B, A = Bs[i].double() / b, As[i].double() / a
        sigma = torch.linalg.svdvals(B @ A)[:r]
        assert max(svd_errors(of_layer(svd, i)._replace(S=sigma), B, A)) <= max(SVD_BOUNDS[2:])
        size = math.log10(b) + math.log10(a) + math.log10(s)
        if size > 0:
            assert torch.isinf(svd.S[i]).all()
        else:
            assert ((svd.S[i] - sigma * 10.0 ** max(size, -300)).abs() <= FLOAT32_STEP).all()
    assert all(map(torch.equal, low_rank_svdvals(Bs, As, scaling), svd.S))


def zero_factors(r: int) -> None:
    B, A = torch.zeros(30, r), torch.randn(r, 20)
    pairs = [(B, A, 1.0), (A.T, B.T, 1.0), (A.T, A, 0.0), (B, torch.zeros(r, 20), 1.0)]
    svd = low_rank_svd(*map(list, zip(*pairs, strict=True)))
    assert not svd.rank.any() and not svd.info.any()
    assert not any(tensor.any() for column in svd[:3] for tensor in column)


def no_rank_rows_or_columns() -> None:
    """Alone, and in a list beside a pair that has them."""
    sizes = [(3, 4, 0), (0, 4, 2), (3, 0, 2), (0, 0, 0), (6, 5, 2)]
    Bs = [torch.randn(m, r) for m, _, r in sizes]
    As = [torch.randn(r, n) for _, n, r in sizes]
    svd = low_rank_svd(Bs, As)
    for i, (m, n, _) in enumerate(sizes[:4]):
        for one in (of_layer(svd, i), low_rank_svd(Bs[i], As[i])):
            assert [t.shape for t in one[:3]] == [(m, 0), (0,), (0, n)]
            assert int(one.rank) == int(one.info) == 0
    check(of_layer(svd, 4), Bs[4], As[4])


def repeated_sigma(r: int) -> None:
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


def dependent_columns(dtype: torch.dtype) -> None:
    B, A = torch.randn(70, 10).to(dtype), torch.randn(10, 60).to(dtype)
    B[:, 3], B[:, 7], A[4], A[5] = B[:, 1], -2 * B[:, 1], A[0], 0.0
    svd = low_rank_svd(B, A)
    check(svd, B, A)
    assert int(svd.rank) == torch.linalg.matrix_rank(B.double() @ A.double())
    B[:, 1:] = B[:, :1]
    svd = low_rank_svd(B, A)
    check(svd, B, A)
    assert int(svd.rank) == 1


def factors_that_cancel() -> None:
    B, A = torch.randn(50, 4), torch.randn(4, 30)
    B[:, 1], A[1] = B[:, 0], -A[0]
    svd = low_rank_svd(B, A)
    check(svd, B, A)
    assert int(svd.rank) == 2
    svd = low_rank_svd(B[:, :2], A[:2])
    assert int(svd.rank) == 0 and not svd.S.any()


def not_finite(bad: float, count: int = 11) -> None:
    """One bad value makes its pair NaN and leaves the others, those of its vector lanes too."""
    Bs, As = [torch.randn(40, 5) for _ in range(count)], [torch.randn(5, 30) for _ in range(count)]
    scaling, places = [1.0] * count, (count // 4, count // 2, 3 * count // 4)
    wanted = low_rank_svd([*Bs], [*As], [*scaling])
    Bs[places[0]][2, 4] = As[places[1]][2, 4] = scaling[places[2]] = bad
    svd = low_rank_svd(Bs, As, scaling)
    assert svd.info.tolist() == [-(i in places) for i in range(count)]
    for i in range(count):
        if i in places:
            assert int(svd.rank[i]) == 0
            assert all(tensor.isnan().all() for tensor in of_layer(svd, i)[:3])
        else:
            assert equal(of_layer(svd, i), of_layer(wanted, i))


def strided_factors_are_left_alone() -> None:
    B, A = torch.randn(40, 6), torch.randn(6, 50)
    wanted = low_rank_svd(B, A)
    for (name, b), a in zip(layouts(B).items(), layouts(A).values(), strict=True):
        if b.dim() == 2:
            assert equal(low_rank_svd(b, a), wanted), name
            assert torch.equal(b, B) and torch.equal(a, A)
    assert int(low_rank_svd(torch.randn(40, 1).expand(40, 6), A).rank) == 1


def named(*calls: tuple[Callable[..., None], tuple]) -> dict[str, Callable[[], None]]:
    """Checks by a name that tells their arguments."""
    return {
        f"{check.__name__}({', '.join(map(str, arguments))})": functools.partial(check, *arguments)
        for check, arguments in calls
    }


def edge_cases(ranks: Iterable[int], bad: Iterable[float], count: int) -> dict[str, Callable]:
    """Every edge; `ranks`: those of the kernels, each group of them once; pairs in a list."""
    singles = (
        lengths_traded_between_columns_and_rows,
        no_rank_rows_or_columns,
        factors_that_cancel,
        strided_factors_are_left_alone,
    )
    by_rank = (repeated_sigma, singular_values_outside_float32_are_reported)
    return named(
        *((check, ()) for check in singles),
        *((scales, pair) for pair in SCALES),
        *((dependent_columns, (dtype,)) for dtype in (F32, BF16)),
        *((zero_factors, (r,)) for r in (1, *ranks)),
        *((check, (r,)) for check in by_rank for r in ranks),
        *((not_finite, (value, count)) for value in bad),
    )


# ---- lists


def check_list(
    Bs: list[Tensor], As: list[Tensor], scaling: list[float], alone: Iterable[int] = ()
) -> None:
    """Each pair is right where it stands; those of `alone` have the bits of a list of one."""
    svd = low_rank_svd(Bs, As, scaling)
    values = low_rank_svdvals(Bs, As, scaling)
    for i, (B, A) in enumerate(zip(Bs, As, strict=True)):
        check(of_layer(svd, i), B, A, scaling[i])
        assert torch.equal(values[i], svd.S[i])
    for i in alone:
        assert equal(low_rank_svd(Bs[i], As[i], scaling[i]), of_layer(svd, i))
        assert torch.equal(low_rank_svdvals(Bs[i], As[i], scaling[i]), svd.S[i])
    assert svd.rank.dtype is svd.info.dtype is torch.int64


def check_equal_bits(count: int, runs: int = DETERMINISM_RUNS) -> None:
    Bs, As, scaling = ragged(count)
    first = low_rank_svd(Bs, As, scaling)
    for _ in range(runs - 1):
        again = low_rank_svd(Bs, As, scaling)
        assert all(equal(of_layer(first, i), of_layer(again, i)) for i in range(count))


def check_signs_of_the_cpu() -> None:
    B, A = torch.randn(40, 6), torch.randn(6, 50)
    svd = low_rank_svd(B, A)
    with peftkern.use_backend("cpu"):
        cpu = low_rank_svd(B, A)
    assert torch.allclose(svd.U, cpu.U, atol=SVD_BOUNDS[2])
    assert torch.allclose(svd.Vh, cpu.Vh, atol=SVD_BOUNDS[2])


# ---- Jacobi's method on square cores, against LAPACK


def check_cores(svd: tuple[Tensor, ...], cores: Tensor, scale: float = 1.0) -> None:
    """As far as the singular values say what a vector is."""
    sigma, left, right, info = svd
    r, wanted = cores.shape[1], torch.linalg.svdvals(cores / scale)
    top = wanted[:, :1].clamp(min=1e-300)
    assert not info.any() and (sigma[:, :-1] >= sigma[:, 1:]).all()
    assert ((sigma / scale - wanted).abs() / top).max() <= SVD_BOUNDS_64[0]
    alive = (sigma > 0).double()
    unit = torch.eye(r, dtype=F64)
    assert (left.mT @ left - unit).abs().max() <= SVD_BOUNDS_64[2]
    right = right * alive[:, None]
    assert (right.mT @ right - torch.diag_embed(alive)).abs().max() <= SVD_BOUNDS_64[2]
    product = left * (sigma / scale)[:, None] @ right.mT
    assert ((product - cores / scale).abs() / top[:, :, None]).max() <= SVD_BOUNDS_64[3]
    largest = left.gather(1, left.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()
