"""Both products of block Lanczos, and the squares of row norms, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_as_accurate_as_torch
from torch import Tensor

from peftkern.backends import ops, reference
from peftkern.backends.cpu import module as native
from peftkern.functional.nf4 import dequantize_nf4, quantize_nf4

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


def eager(weight: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    weight = weight.to(x.dtype)
    y = x @ weight.T
    return y, y @ weight, weight.square().sum(1)


def assert_right(got: tuple[Tensor, ...], weight: Tensor, x: Tensor) -> None:
    results = got, eager(weight, x), eager(weight.double(), x.double())
    for ours, plain, right in zip(*results, strict=True):
        assert_as_accurate_as_torch(ours, plain, right)


@settings(max_examples=40)
@given(
    m=st.sampled_from([0, 1, 3, 4, 63, 64, 65, 200]),
    n=st.sampled_from([1, 15, 16, 33, 64, 257, 1100]),
    width=st.sampled_from([1, 2, 3, 8, 13, 24, 40]),
    dtype=st.sampled_from([F32, BF16, F16]),
    seed=st.integers(0, 2**31),
)
def test_as_accurate_as_torch(m, n, width, dtype, seed):
    torch.manual_seed(seed)
    weight, x = torch.randn(m, n).to(dtype), torch.randn(width, n)
    assert_right(ops.run("gram_product", weight, x, True, True), weight, x)


@pytest.mark.parametrize("isa", native.cpu_isas())
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(70, 128), (67, 193)])
def test_nf4_equals_dense_bit_for_bit(isa, double_quant, shape):
    w, x = quantize_nf4(torch.randn(shape), double_quant=double_quant), torch.randn(7, shape[1])
    dense = dequantize_nf4(w, F32)
    with native.use_isa(isa):
        got = ops.run("nf4_gram_product", w.tensors, w.layout, x, True, True)
        same = ops.run("gram_product", dense, x, True, True)
    assert all(torch.equal(*pair) for pair in zip(got, same, strict=True))
    assert_right(got, dense, x)


def test_what_is_not_needed_is_left_out():
    weight, x = torch.randn(70, 40).T, torch.randn(5, 70)
    y, z, squares = ops.run("gram_product", weight, x, True, True)
    for need_z, need_squares in ((False, False), (True, False), (False, True)):
        got = ops.run("gram_product", weight, x, need_z, need_squares)
        wanted = (y, z if need_z else z.new_empty(0), squares if need_squares else z.new_empty(0))
        assert all(torch.equal(*pair) for pair in zip(got, wanted, strict=True))


@pytest.mark.parametrize("isa", native.cpu_isas())
@pytest.mark.parametrize("m", [1, 3, 66])
def test_inf_is_not_nan(isa, m):
    """Behind the last row of a group Inf times zero would be."""
    weight, x = torch.rand(m, 33) + 0.1, torch.rand(5, 33)
    x[2, 0] = torch.inf
    with native.use_isa(isa):
        y, z, _ = ops.run("gram_product", weight, x, True, True)
    for got in (y, z):
        assert got[2].isposinf().all() and got[[0, 1, 3, 4]].isfinite().all()


def test_no_columns_no_rows_no_vectors():
    for m, n, width in ((3, 0, 2), (0, 3, 2), (3, 2, 0)):
        got = ops.run("gram_product", torch.randn(m, n), torch.randn(width, n), True, True)
        assert [t.shape for t in got] == [(width, m), (width, n), (m,)]
        assert not got[0].any() and not got[1].any()


def test_the_reference_is_right_in_both_precisions():
    weight, x = torch.randn(30, 20), torch.randn(4, 20)
    for dtype in (F32, F64):
        got = reference.gram_product(weight.to(dtype), x.to(dtype), True, True)
        assert {t.dtype for t in got} == {dtype}
        assert_right(tuple(t.float() for t in got), weight, x)
