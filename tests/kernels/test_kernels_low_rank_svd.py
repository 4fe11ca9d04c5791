"""The Triton kernels of the low-rank SVD, run interpreted, to the CPU version's bounds."""

from __future__ import annotations

import math

import pytest
import torch
from interpreted import INTERPRETED
from linear_cases import BF16, F16, F32, F64
from low_rank_svd_cases import (
    check,
    equal,
    graded,
    of_layer,
    orthonormal,
    singular_values_outside_float32_are_reported,
)
from tolerances import SVD_BOUNDS, SVD_BOUNDS_FAST

import peftkern
from peftkern.backends import pointers
from peftkern.backends.device import BackendUnavailableError
from peftkern.functional.low_rank_svd import low_rank_svd, low_rank_svdvals

pytestmark = INTERPRETED

SHAPES = [  # m, n, r: both ends of each block of ranks, more rank than rows or columns
    (1, 1, 1),
    (5, 3, 1),
    (40, 30, 3),
    (130, 41, 8),
    (64, 64, 16),
    (7, 40, 12),
    (40, 5, 12),
    (97, 80, 64),
]


@pytest.fixture(autouse=True)
def triton_kernels():
    with peftkern.use_backend("triton"):
        yield


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape):
    m, n, r = shape
    B, A = torch.randn(m, r), torch.randn(r, n)
    svd = low_rank_svd(B, A, -1.5)
    check(svd, B, A, -1.5)
    assert int(svd.rank) == min(m, n, r)


@pytest.mark.parametrize("dtypes", [(BF16, F32), (F32, F16), (F16, BF16), (BF16, BF16)], ids=str)
def test_dtypes(dtypes):
    B, A = torch.randn(70, 5).to(dtypes[0]), torch.randn(5, 60).to(dtypes[1])
    check(low_rank_svd(B, A), B, A)


def test_singular_values_outside_float32_are_reported():
    singular_values_outside_float32_are_reported(4)


@pytest.mark.parametrize("kappa", [1, 1e4, 9e4, 3e5, 1e6])
def test_condition_numbers(kappa):
    B, A = (factor.float() for factor in graded(80, 70, 7, kappa))
    check(low_rank_svd(B, A, 0.5), B, A, 0.5)
    if kappa == 1e4:
        check(low_rank_svd(B, A, mode="fast"), B, A, bounds=SVD_BOUNDS_FAST)


def test_second_pass_of_the_largest_block():
    B, A = (factor.float() for factor in graded(70, 60, 33, 1e6))
    check(low_rank_svd(B, A), B, A)


def test_several_tiles():
    """More rows than one program takes, with and without a second pass, in both directions."""
    B, A = graded(1300, 1100, 4, 1e6)
    B, A = B.float(), A.float()
    check(low_rank_svd(B, A), B, A)
    B, A = torch.randn(30, 4), torch.randn(4, 1030).bfloat16()
    check(low_rank_svd(B, A), B, A)


@pytest.mark.parametrize("scales", [(1e-20, 1e20), (1e20, 1e20), (1e-20, 1e-20)], ids=str)
def test_scales(scales):
    B, A = torch.randn(60, 5) * scales[0], torch.randn(5, 50) * scales[1]
    scaling = 1 / math.prod(scales)
    check(low_rank_svd(B, A, scaling), B, A, scaling)


def test_zero_factors_and_empty_ones():
    B, A = torch.randn(30, 4), torch.randn(4, 20)
    sizes = [(3, 4, 0), (0, 4, 2), (3, 0, 2), (0, 0, 0)]
    Bs = [torch.zeros(30, 4), B, B, *(torch.randn(m, r) for m, _, r in sizes)]
    As = [A, torch.zeros(4, 20), A, *(torch.randn(r, n) for _, n, r in sizes)]
    svd = low_rank_svd(Bs, As, [1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    assert not svd.rank.any() and not svd.info.any()
    assert not any(tensor.any() for column in svd[:3] for tensor in column)
    assert [S.shape for S in svd.S] == [(4,)] * 3 + [(0,)] * 4


def test_repeated_sigma():
    """Single vectors of a repeated value mean nothing: their subspace does."""
    sigma = torch.ones(8, dtype=F64)
    sigma[4:] = 0.25
    U, V = orthonormal(90, 8), orthonormal(80, 8)
    B, A = (U * sigma.sqrt()).float(), (V * sigma.sqrt()).T.float()
    svd = low_rank_svd(B, A)
    check(svd, B, A)
    for group in (slice(0, 4), slice(4, 8)):
        got = svd.U.double()[:, group]
        difference = got @ got.T - U[:, group] @ U[:, group].T
        assert difference.abs().max() <= SVD_BOUNDS[2]


def test_dependent_columns():
    B, A = torch.randn(70, 10), torch.randn(10, 60)
    B[:, 3], B[:, 7], A[4], A[5] = B[:, 1], -2 * B[:, 1], A[0], 0.0
    svd = low_rank_svd(B, A)
    check(svd, B, A)
    assert int(svd.rank) == torch.linalg.matrix_rank(B.double() @ A.double())
    B[:, 1], A[1] = B[:, 0], -A[0]  # which cancel
    svd = low_rank_svd(B[:, :2], A[:2])
    assert int(svd.rank) == 0 and not svd.S.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["lora_B", "lora_A", "scaling"])
def test_nan_and_inf(where, bad):
    Bs, As = [torch.randn(40, 5) for _ in range(2)], [torch.randn(5, 30) for _ in range(2)]
    scaling = [1.0, 1.0]
    wanted = low_rank_svd(Bs[0], As[0])
    if where == "scaling":
        scaling[1] = bad
    else:
        {"lora_B": Bs, "lora_A": As}[where][1][2, 4] = bad
    svd = low_rank_svd(Bs, As, scaling)
    assert svd.info.tolist() == [0, -1] and int(svd.rank[1]) == 0
    assert all(tensor.isnan().all() for tensor in of_layer(svd, 1)[:3])
    assert equal(of_layer(svd, 0), wanted)


def test_ragged_lists_equal_single_pairs():
    """Ranks of two blocks, three dtypes, other lengths."""
    Bs = [torch.randn(m, r).to(d) for m, r, d in [(40, 3, F32), (530, 17, BF16), (9, 5, F16)]]
    As = [torch.randn(r, n).to(d) for r, n, d in [(3, 70, BF16), (17, 20, F32), (5, 8, F32)]]
    scaling = [0.5, -2.0, 3.0]
    svd = low_rank_svd(Bs, As, scaling)
    values = low_rank_svdvals(Bs, As, scaling)
    for i, (B, A) in enumerate(zip(Bs, As, strict=True)):
        check(of_layer(svd, i), B, A, scaling[i])
        assert torch.equal(values[i], svd.S[i])
    for i in (0, 2):
        assert equal(low_rank_svd(Bs[i], As[i], scaling[i]), of_layer(svd, i))


def test_bit_identical():
    Bs, As = [torch.randn(40, 5), torch.randn(30, 2)], [torch.randn(5, 9), torch.randn(2, 50)]
    first, again = low_rank_svd(Bs, As), low_rank_svd(Bs, As)
    assert all(equal(of_layer(first, i), of_layer(again, i)) for i in range(2))


def test_layouts():
    B, A = torch.randn(6, 80)[:, ::2].T, torch.randn(50, 6).T
    assert equal(low_rank_svd(B, A), low_rank_svd(B.contiguous(), A.contiguous()))


def test_same_signs_as_on_a_cpu():
    B, A = torch.randn(40, 6), torch.randn(6, 50)
    svd = low_rank_svd(B, A)
    with peftkern.use_backend("cpu"):
        cpu = low_rank_svd(B, A)
    assert torch.allclose(svd.U, cpu.U, atol=SVD_BOUNDS[2])
    assert torch.allclose(svd.Vh, cpu.Vh, atol=SVD_BOUNDS[2])


def test_unconverged_pairs_reach_info(monkeypatch):
    from peftkern.kernels import low_rank_svd as kernels

    monkeypatch.setattr(kernels, "SWEEPS", 1)
    svd = low_rank_svd(torch.randn(50, 12), torch.randn(12, 40))
    assert int(svd.info) > 0 and torch.isfinite(svd.U).all()


@pytest.mark.parametrize(
    ("r", "dtype", "reason"), [(65, F32, "the rank is 65"), (2, F64, "the dtype is torch.float64")]
)
def test_what_is_not_supported_is_said(r, dtype, reason):
    with pytest.raises(BackendUnavailableError, match=reason):
        low_rank_svd(torch.randn(70, r, dtype=dtype), torch.randn(r, 70))


def test_address_table():
    tensors = [torch.zeros(3), torch.zeros(2, 5)]
    table = pointers.address_table(tensors, torch.device("cpu"), [7, -1])
    assert table.tolist() == [*(tensor.data_ptr() for tensor in tensors), 7, -1]
    assert table.dtype is torch.int64
    with pytest.raises(ValueError, match=r"tensors: expected contiguous ones on cpu, got"):
        pointers.address_table([torch.zeros(3, 4).T], torch.device("cpu"))
    with pytest.raises(ValueError, match="on meta"):
        pointers.address_table([torch.zeros(3, device="meta")], torch.device("cpu"))
