"""The Triton kernels of the low-rank SVD, run interpreted, to the CPU version's bounds.

Each pair costs a second in the interpreter, so that a case is here once where it is small, and for
each block of ranks or tile of rows; the rest is `more` or `long`.
"""

from __future__ import annotations

import math

import pytest
import torch
from interpreted import INTERPRETED
from linear_cases import BF16, F16, F32, F64
from low_rank_svd_cases import (
    OUTSIDE,
    SCALES,
    check,
    check_condition,
    check_list,
    check_signs_of_the_cpu,
    dependent_columns,
    equal,
    factors_that_cancel,
    graded,
    named,
    no_rank_rows_or_columns,
    not_finite,
    of_layer,
    repeated_sigma,
    scales,
    singular_values_outside_float32_are_reported,
    zero_factors,
)

import peftkern
from peftkern.backends import pointers
from peftkern.backends.device import BackendUnavailableError
from peftkern.functional.low_rank_svd import low_rank_svd

pytestmark = INTERPRETED

MORE, LONG = pytest.mark.more, pytest.mark.long
EDGES = named(
    (scales, (1e-20, 1e20)),
    (zero_factors, (4,)),
    (no_rank_rows_or_columns, ()),
    (repeated_sigma, (8,)),
    (dependent_columns, (F32,)),
    (factors_that_cancel, ()),
    (not_finite, (math.nan, 4)),
    (singular_values_outside_float32_are_reported, (2, tuple(OUTSIDE)[1::3])),
)
MORE_EDGES = named(
    *((scales, pair) for pair in SCALES),
    (not_finite, (math.inf, 4)),
    (singular_values_outside_float32_are_reported, (4,)),
)
SHAPES = [  # m, n, r: each block of ranks but the largest, more rank than rows or columns
    (1, 1, 1),
    (40, 30, 3),
    (7, 40, 12),
    (40, 5, 12),
    *(pytest.param(s, marks=LONG) for s in ((5, 3, 1), (130, 41, 8), (64, 64, 16), (70, 60, 33))),
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


@pytest.mark.parametrize(
    "kappa",
    [9e4, 3e5, pytest.param(1e4, marks=MORE), *(pytest.param(k, marks=LONG) for k in (1, 1e6))],
)
def test_condition_numbers(kappa):
    check_condition(80, 70, 7, kappa)


@pytest.mark.more
def test_second_pass_of_the_largest_block():
    """`test_condition_numbers` takes one in the smallest."""
    B, A = (factor.float() for factor in graded(97, 80, 64, 1e6))
    check(low_rank_svd(B, A), B, A)


def test_several_tiles():
    """More rows than one program takes, with and without a second pass, in both directions."""
    B, A = graded(1300, 1100, 4, 1e6)
    B, A = B.float(), A.float()
    check(low_rank_svd(B, A), B, A)
    B, A = torch.randn(30, 4), torch.randn(4, 1030).bfloat16()
    check(low_rank_svd(B, A), B, A)


def test_results_are_copied_to_given_tensors():
    """Here no kernel writes to them itself."""
    pairs = ([torch.randn(9, 2), torch.randn(7, 3)], [torch.randn(2, 5), torch.randn(3, 8)])
    wanted, out = low_rank_svd(*pairs), low_rank_svd([-B for B in pairs[0]], pairs[1])
    assert low_rank_svd(*pairs, out=out) is out
    assert all(equal(of_layer(out, i), of_layer(wanted, i)) for i in range(2))


@pytest.mark.parametrize("edge", EDGES)
def test_edges(edge):
    EDGES[edge]()


@pytest.mark.long
@pytest.mark.parametrize("edge", MORE_EDGES)
def test_more_edges(edge):
    MORE_EDGES[edge]()


def test_ragged_lists_equal_single_pairs():
    """Ranks of two blocks, three dtypes in both factors, other lengths; the same bits again."""
    Bs = [torch.randn(m, r).to(d) for m, r, d in [(40, 3, F32), (90, 17, BF16), (9, 5, F16)]]
    As = [torch.randn(r, n).to(d) for r, n, d in [(3, 70, BF16), (17, 20, F16), (5, 8, F32)]]
    check_list(Bs, As, [0.5, -2.0, 3.0], alone=(0, 2))


@pytest.mark.long
def test_bit_identical():
    Bs, As = [torch.randn(40, 5), torch.randn(30, 2)], [torch.randn(5, 9), torch.randn(2, 50)]
    first, again = low_rank_svd(Bs, As), low_rank_svd(Bs, As)
    assert all(equal(of_layer(first, i), of_layer(again, i)) for i in range(2))


def test_layouts():
    B, A = torch.randn(3, 80)[:, ::2].T, torch.randn(50, 3).T
    assert equal(low_rank_svd(B, A), low_rank_svd(B.contiguous(), A.contiguous()))


def test_same_signs_as_on_a_cpu():
    check_signs_of_the_cpu()


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
