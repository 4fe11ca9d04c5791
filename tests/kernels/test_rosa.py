"""RoSA's Triton kernels under the interpreter, against float64 and the reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from grids import examples, thinned
from hypothesis import given
from hypothesis import strategies as st
from interpreted import INSIDE_TENSORS, RUNS
from linear_cases import BF16, F16, F32, F64
from nf4_weights import assert_same_bits, assert_same_every_time
from rosa_cases import (
    SHAPES,
    assert_exact,
    check_function,
    check_mask,
    check_products,
    check_wide_columns,
    products,
    products_of_layout,
    random_mask,
    uneven_mask,
    whole_numbers,
)

import peftkern
from peftkern.backends import ops
from peftkern.functional.rosa import SparseMask
from peftkern.kernels import rosa

pytestmark = INSIDE_TENSORS

INDICES = [torch.int32, torch.int64]
CUT = 16  # entries to a piece, so that small masks are cut many times


@contextmanager
def pieces_of(entries: int) -> Iterator[None]:
    """Cut the entries of spmm at multiples of so many, unless there are too many of them."""
    before, rosa._LEAST_PIECE = rosa._LEAST_PIECE, entries
    try:
        yield
    finally:
        rosa._LEAST_PIECE = before


@pytest.mark.parametrize(("shape", "dtype"), thinned(SHAPES, [F32, BF16, F16]))
def test_products(shape, dtype):
    check_products(*shape, dtype, torch.int32)


@pytest.mark.parametrize(
    ("shape", "dtype", "index"),
    thinned([*SHAPES[1:4], (65, 7, 300, 100)], [F32, BF16], INDICES[::-1]),
)
def test_products_in_pieces(shape, dtype, index):
    with pieces_of(CUT):
        check_products(*shape, dtype, index)


@pytest.mark.parametrize(("kind", "piece"), thinned(["rows", "columns", "both"], [CUT, 1024]))
def test_uneven_rows(kind, piece):
    """Whole rows next to empty ones; a row is longer than a piece, and a piece than a row."""
    with pieces_of(piece):
        check_mask(uneven_mask(kind, (40, 90)), 20, BF16)


def test_several_slabs_of_rows():
    assert rosa._SLAB < 1100
    check_products(1100, 5, 7, 12, BF16, torch.int32)
    assert_exact(whole_numbers(random_mask((5, 7), 12), 2 * rosa._SLAB + 1))


def test_programs_that_take_several_tiles_of_x():
    N, M = 320, 600
    assert -(-N // rosa._ROWS) * -(-M // rosa._BLOCK_M) >= 2 * 8 * 4  # on the four of interpreters
    with pieces_of(CUT):
        assert_exact(whole_numbers(random_mask((N, 2), 40), M))


@examples(1 / 20)
@given(
    T=st.integers(0, 140),
    N=st.integers(1, 60),
    K=st.integers(1, 60),
    share=st.floats(0, 1),
    piece=st.sampled_from([16, 64, 1024]),
    index=st.sampled_from(INDICES),
)
def test_products_of_any_shape(T, N, K, share, piece, index):
    mask = random_mask((N, K), int(share**3 * N * K), index, seed=T)
    with pieces_of(piece):
        assert_exact(whole_numbers(mask, T))


@pytest.mark.parametrize("ends", [[0, 16, 16, 32], [0, 16, 32, 48], [1, 31, 33, 64], [0, 0, 0, 64]])
def test_cuts_between_and_inside_of_groups(ends):
    """Groups of sixteen rows that begin or end at a multiple of the piece, and empty ones."""
    N = 16 * len(ends)
    counts = torch.tensor(ends).diff(prepend=torch.zeros(1, dtype=torch.int64))
    rows = torch.repeat_interleave(torch.arange(len(ends)) * 16 + 5, counts)
    columns = torch.cat([torch.arange(int(count)) for count in counts])
    mask = SparseMask.from_indices(rows, columns, (N, 64))
    with pieces_of(CUT):
        assert_exact(whole_numbers(mask, 3))


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_columns_beyond_sixteen_bits(index):
    check_wide_columns(index)


@pytest.mark.parametrize(
    ("layout", "T"), thinned(["transposed", "expanded", "3-d", "sliced", "misaligned"], [6, 16])
)
def test_layouts_give_the_same_bits(layout, T):
    assert_same_bits(*products_of_layout(layout, T, F64))


@pytest.mark.parametrize(
    ("where", "value", "piece"),
    thinned(["x", "y", "values"], [float("nan"), -float("inf")], [CUT, 1024], diagonals=2),
)
def test_nan_and_inf_go_where_the_reference_lets_them(where, value, piece):
    """To the rows of S that read them, and not to their neighbors in a program."""
    mask = random_mask((20, 30), 90)
    operands = {"x": torch.randn(9, 30), "y": torch.randn(9, 20), "values": torch.randn(90)}
    operands["values"][7] = 0.0  # which times Inf is NaN
    operands[where].view(-1)[77] = value
    with pieces_of(piece):
        got = products(**operands, mask=mask)
    with peftkern.use_backend("reference"):
        wanted = products(**operands, mask=mask)
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.isposinf(), b.isposinf())
        assert a.isfinite().any()
    assert not all(a.isfinite().all() for a in got)


@pytest.mark.parametrize("index", INDICES, ids=str)
@pytest.mark.parametrize("column", [7, -1, 2**31 - 1])
def test_a_column_out_of_range_is_not_read_and_gives_nan(column, index):
    """A GPU raises nothing that would have to wait for it."""
    mask, values = random_mask((5, 7), 9, index), torch.ones(9)
    col = mask.col.clone()
    col[4] = column
    row = int(mask.flat()[4]) // 7
    y = torch.ones(3, 5)
    ops.rosa_spmm_(y, torch.ones(3, 7), values, mask.crow, col, None)
    assert torch.equal(y.isnan(), (torch.arange(5) == row).expand(3, 5))
    got = ops.rosa_sddmm(torch.ones(3, 5), torch.ones(3, 7), mask.crow, col)
    assert torch.equal(got.isnan(), torch.arange(9) == 4)


@pytest.mark.parametrize("piece", [CUT, 1024])
@pytest.mark.parametrize(
    "crow",
    [[5] * 41, [0] * 41, [1 << 30] * 41, [-(1 << 30)] * 41, [*range(200, 159, -1)], [0, 999] * 20],
    ids=lambda crow: f"{crow[:2]}",
)
def test_rows_that_do_not_ascend_read_nothing_out_of_bounds(crow, piece):
    """What comes out is nobody's business; the fixture looks at every address."""
    mask, crow = random_mask((40, 30), 200), torch.tensor([*crow, 0][:41], dtype=torch.int32)
    x, y, values = torch.randn(20, 30), torch.randn(20, 40), torch.randn(200)
    with pieces_of(piece):
        ops.rosa_spmm_(y, x, values, crow, mask.col, None)
        ops.rosa_sddmm(y, x, crow, mask.col)


def test_nothing_to_do():
    mask, empty = random_mask((5, 7), 9), random_mask((5, 7), 0)
    for T, m in ((0, mask), (3, empty), (0, empty)):
        x, y = torch.randn(T, 7), torch.randn(T, 5)
        before = y.clone()
        ops.rosa_spmm_(y, x, torch.ones(m.nnz), m.crow, m.col, None)
        assert torch.equal(y, before)
        got = ops.rosa_sddmm(y, x, m.crow, m.col)
        assert got.dtype is F32 and torch.equal(got, torch.zeros(m.nnz))


@pytest.mark.parametrize("runs", RUNS)
def test_equal_bits_every_time_and_nothing_else_is_written_to(runs):
    mask, values = random_mask((17, 9), 30), torch.randn(30)
    x, y = torch.randn(5, 9).to(BF16), torch.randn(5, 17).to(BF16)
    pieces = (x, y, values, *mask.tensors)
    before = [t.clone() for t in pieces]
    with pieces_of(CUT):
        assert_same_every_time(lambda: products(x, y, values, mask), runs)
    assert all(torch.equal(t, old) for t, old in zip(pieces, before, strict=True))


def test_pieces_share_the_work():
    """Longer ones where there is more to do, and never shorter than they are worth."""
    assert 1 << rosa._shift(100, 1, 132) == rosa._LEAST_PIECE
    for nnz, blocks in ((167_772, 8), (167_772, 64), (1 << 28, 64)):
        piece = 1 << rosa._shift(nnz, blocks, 132)
        assert nnz * blocks / (4 * 132) <= piece <= 2 * nnz * blocks / (4 * 132)


@pytest.mark.parametrize("nf4", [False, True])
def test_layer_and_gradients_are_as_accurate_as_torch(nf4):
    assert check_function(BF16, nf4) == {"triton"}


@pytest.mark.parametrize(
    ("first", "x", "reason"),
    [
        (F64, F64, r"the dtypes are torch\.float64 and torch\.float64"),
        (F32, BF16, r"the dtypes are torch\.float32 and torch\.bfloat16"),
    ],
)
def test_reasons_against_it(first, x, reason):
    mask = random_mask((5, 7), 9)
    x, y = torch.ones(3, 7, dtype=x), torch.ones(3, 5, dtype=first)
    with pytest.raises(peftkern.BackendUnavailableError, match=reason):
        ops.rosa_sddmm(y, x, mask.crow, mask.col)
    with pytest.raises(peftkern.BackendUnavailableError, match=reason):
        ops.rosa_spmm_(y, x, torch.ones(9), mask.crow, mask.col, None)


def test_more_rows_than_a_grid_has():
    x = torch.empty(1, 1).expand(9_000_000, 1)
    assert rosa.refusal_sddmm(x, x) == "x has 9000000 rows, above 8388480"
