"""RoSA's function: sparse ops against dense float64, masks, values and gradients."""

from __future__ import annotations

import pytest
import torch
from grids import thinned
from hypothesis import given
from hypothesis import strategies as st
from linear_cases import BF16, F16, F32, F64
from nf4_weights import assert_same_every_time
from rosa_cases import (
    SHAPES,
    assert_exact,
    check_function,
    check_products,
    check_wide_columns,
    formula,
    operands,
    products,
    products_of_layout,
    random_mask,
    whole_numbers,
)
from tolerances import GRADCHECK

import peftkern
from peftkern.backends import ops
from peftkern.backends.programs import PLAIN
from peftkern.backends.reference import rosa as reference
from peftkern.functional.rosa import SparseMask, rosa_linear


@pytest.mark.parametrize(
    ("shape", "dtype", "index"),
    thinned(SHAPES, [F32, BF16, F16], [torch.int32, torch.int64], diagonals=2),
)
def test_products(shape, dtype, index, every_kernel):
    check_products(*shape, dtype, index)


@given(
    T=st.integers(0, 140),
    N=st.integers(1, 80),
    K=st.integers(1, 80),
    share=st.floats(0, 1),
    index=st.sampled_from([torch.int32, torch.int64]),
)
def test_products_of_any_shape(T, N, K, share, index):
    mask = random_mask((N, K), int(share * N * K), index, seed=T)
    assert_exact(whole_numbers(mask, T))


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_columns_beyond_sixteen_bits(index, every_kernel):
    check_wide_columns(index)


@pytest.mark.parametrize("layout", ["transposed", "expanded", "3-d", "sliced"])
def test_products_of_any_layout(layout, every_kernel):
    torch.testing.assert_close(*products_of_layout(layout, 6))


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("case", ["column", "negative", "crow", "end", "order", "start"])
def test_an_index_out_of_range_raises(case, index, backend):
    mask, values = random_mask((5, 7), 9, index), torch.zeros(9)
    crow, col, order = mask.crow.clone(), mask.col.clone(), torch.arange(9, dtype=index)
    if case in ("column", "negative"):
        col[4] = 7 if case == "column" else -1
    elif case == "order":
        order[3] = 9
    else:
        crow[{"crow": 2, "end": -1, "start": 0}[case]] = {"crow": 100, "end": 8, "start": 1}[case]
    x, y = torch.ones(3, 7), torch.ones(3, 5)
    with pytest.raises(ValueError, match=r"order|crow|col|starts|index"):
        ops.rosa_spmm_(y, x, values, crow, col, order)
    assert torch.equal(y, torch.ones(3, 5))
    if case != "order":
        with pytest.raises(ValueError, match=r"crow|col|starts|index"):
            ops.rosa_sddmm(y, x, crow, col)


@pytest.mark.parametrize("chunk", [1, 40, 700])
def test_reference_products_of_every_part(monkeypatch, chunk):
    """Some entries, and some rows, at a time."""
    monkeypatch.setattr(reference, "_CHUNK", chunk)
    with peftkern.use_backend("reference"):
        for shape in SHAPES:
            check_products(*shape, F32, torch.int32)


def test_products_are_deterministic(every_kernel):
    mask, values = random_mask((130, 90), 3000), torch.randn(3000)
    x, y = torch.randn(300, 90), torch.randn(300, 130)
    # torch's sums may depend on threads, ours do not
    threads = () if every_kernel in PLAIN else (1, 2, 3)
    assert_same_every_time(lambda: products(x, y, values, mask), threads=threads)


def test_nan_and_inf_stay_in_their_rows(every_kernel):
    mask, values = random_mask((9, 12), 40), torch.randn(40)
    x, y = torch.randn(20, 12), torch.zeros(20, 9)
    x[3, 5], x[7, 2] = float("nan"), float("inf")
    ops.rosa_spmm_(y, x, values, mask.crow, mask.col, None)
    S = mask.to_dense(values)
    assert torch.equal(y[3].isnan(), S[:, 5] != 0)
    assert torch.equal(y[7].isinf(), S[:, 2] != 0)
    others = [t for t in range(20) if t not in (3, 7)]
    assert y[others].isfinite().all()


# ---- masks


def test_mask_sorts_its_places():
    rows, columns = torch.tensor([2, 0, 2, 1]), torch.tensor([3, 1, 0, 2])
    mask = SparseMask.from_indices(rows, columns, (4, 5))
    assert mask.crow.tolist() == [0, 1, 2, 4, 4] and mask.col.tolist() == [1, 2, 0, 3]
    assert mask.crow.dtype is mask.order.dtype is torch.int32
    dense = mask.to_dense(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert dense[2, 3] == 4 and dense[2, 0] == 3 and dense.sum() == 10
    again = SparseMask.from_csr(mask.crow.long(), mask.col.long(), (4, 5))
    assert again.col.dtype is torch.int64
    for a, b in zip(again.tensors, mask.tensors, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("rows", "columns", "options", "says"),
    [
        ([0, 0], [1, 1], {}, "every place once"),
        ([0, 4], [1, 1], {}, "rows: expected indices from 0 to 3, got 0 to 4"),
        ([0, 1], [1, -1], {}, "columns: expected indices from 0 to 4"),
        ([0, 1], [1], {}, "as many rows as columns"),
        ([0.5], [1], {}, "rows: expected"),
        ([0], [1], {"dtype": torch.int16}, "dtype: expected"),
    ],
)
def test_mask_refuses(rows, columns, options, says):
    with pytest.raises(ValueError, match=says):
        SparseMask.from_indices(torch.tensor(rows), torch.tensor(columns), (4, 5), **options)


@pytest.mark.parametrize(
    ("crow", "col", "says"),
    [
        ([0, 2, 1], [0, 1], "crow: expected 3 numbers that ascend from 0 to 2"),
        ([0, 1], [0], "crow"),
        ([0, 2, 2], [1, 0], "col: expected the columns of each row to ascend"),
        ([0, 2, 2], [1, 1], "every place once"),
    ],
)
def test_compressed_rows_are_checked(crow, col, says):
    with pytest.raises(ValueError, match=says):
        SparseMask.from_csr(torch.tensor(crow), torch.tensor(col), (2, 3))


# ---- the function


@pytest.mark.parametrize(("dtype", "nf4"), thinned([F32, BF16, F16], [False, True], diagonals=2))
def test_function_and_gradients_are_as_accurate_as_torch(dtype, nf4, every_kernel):
    assert check_function(dtype, nf4) <= {"reference", "cpu"}


@pytest.mark.parametrize("nf4", [False, True])
def test_gradcheck(nf4):
    N, K, nnz = 6, 64, 11
    mask, values = random_mask((N, K), nnz), torch.randn(nnz, dtype=F64, requires_grad=True)
    weight = torch.randn(N, K)
    weight = peftkern.quantize_nf4(weight) if nf4 else weight.double()
    x, A, B, bias = (
        torch.randn(*shape, dtype=F64, requires_grad=True)
        for shape in ((3, K), (2, K), (N, 2), (N,))
    )

    def function(x, A, B, values, bias):
        return rosa_linear(x, weight, A, B, values, mask, scaling=0.7, bias=bias)

    assert torch.autograd.gradcheck(function, (x, A, B, values, bias), **GRADCHECK)


@pytest.mark.parametrize("wanted", ["x", "A", "B", "values", "bias"])
def test_only_the_gradients_that_are_asked_for(wanted):
    o, mask = operands(5, 12, 20, 30, F32), random_mask((12, 20), 30)
    leaf = o[wanted].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = rosa_linear(
            o["x"], o["weight"], o["A"], o["B"], o["values"], mask, scaling=1.5, bias=o["bias"]
        )
    y.square().sum().backward()
    others = {k: v.double().detach() for k, v in o.items() if k != wanted}
    leaf64 = leaf.detach().double().requires_grad_()
    plain = formula(**{**others, wanted: leaf64}, mask=mask, scaling=1.5)
    plain.square().sum().backward()
    torch.testing.assert_close(leaf.grad.double(), leaf64.grad, rtol=1e-4, atol=1e-4)
    kept = {t.data_ptr() for t in saved}
    assert (o["x"].data_ptr() in kept) == (wanted in ("A", "values"))
    assert (o["weight"].data_ptr() in kept) == (wanted == "x")


def test_function_refuses():
    o, mask = operands(5, 12, 20, 30, F32), random_mask((12, 20), 30)
    x, weight, A, B, values, bias = o.values()
    options = {"scaling": 1.0, "bias": bias}
    with pytest.raises(ValueError, match=r"values: expected \[30\]"):
        rosa_linear(x, weight, A, B, values[:-1], mask, **options)
    with pytest.raises(ValueError, match="values: expected a tensor"):
        rosa_linear(x, weight, A, B, values.int(), mask, **options)
    with pytest.raises(ValueError, match=r"mask: expected \[12, 20\]"):
        rosa_linear(x, weight, A, B, values, random_mask((20, 12), 30), **options)
    with pytest.raises(ValueError, match="weight: expected a frozen"):
        rosa_linear(x, weight.requires_grad_(), A, B, values, mask, **options)
    weight.requires_grad_(False)
    with pytest.raises(ValueError, match="weight"):
        rosa_linear(x.bfloat16(), weight, A, B, values, mask, **options)
    with pytest.raises(ValueError, match="x: expected"):
        rosa_linear(x[:, 1:], weight, A, B, values, mask, **options)
