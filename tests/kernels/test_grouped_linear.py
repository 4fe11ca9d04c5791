"""The grouped linear layer's Triton kernels under the interpreter, against a loop in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from grids import thinned
from grouped_cases import GRADIENTS, PAST, Grouped, check, grouped_operands, run_ops
from hypothesis import given
from hypothesis import strategies as st
from interpreted import INSIDE_TENSORS, RUNS
from linear_cases import BF16, F16, F32
from nf4_weights import assert_same_bits, assert_same_every_time
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import peftkern
from peftkern.kernels import grouped_linear, grouped_products
from peftkern.kernels.configs import ceil_div, grouped_tile, rows_of_group
from peftkern.kernels.grouped_products import tiles_of_rows

pytestmark = INSIDE_TENSORS

NAN = float("nan")
SIZES = (0, 1, 5, 17, 33, 0)
SHAPES = [(32, 33, 3), (48, 64, 16), (31, 96, 1)]  # N, K, r; a row of 33 codes starts in a byte
DTYPES = [(BF16, F32), (F32, F32), (BF16, BF16), (F16, F32)]
KINDS = {
    "rows": {},
    "tokens": {"through_rows": False, "bias": False},
    "transposed": {"transposed": True},
    "one weight": {"shared": True},
    "no weight": {"base": False},
    "nf4": {"nf4": True},
    "nf4 transposed": {"nf4": True, "transposed": True},
    "nf4 one weight": {"nf4": True, "shared": True, "transposed": True},
}


def drawn(shape: tuple[int, int, int], *dtypes: torch.dtype, **options) -> Grouped:
    """Operands with NaN in what no group reads, dy included."""
    N, K, r = shape
    with peftkern.use_backend("reference"):  # Triton nests no absmax
        o = grouped_operands(*dtypes, N=N, K=K, r=r, **options)
    o.dy[-PAST:] = NAN
    return o


def small(dtype: torch.dtype = BF16, **options) -> Grouped:
    """Three groups, one empty: five rows and those past the end."""
    return drawn((20, 24, 4), dtype, F32, sizes=(2, 0, 3), **options)


@pytest.mark.parametrize(("kind", "shape", "dtypes"), thinned(list(KINDS), SHAPES, DTYPES))
def test_groups_of_every_size(kind, shape, dtypes):
    check(drawn(shape, *dtypes, sizes=SIZES, **KINDS[kind]))


@pytest.mark.parametrize("kind", ["rows", "transposed", "nf4", "nf4 transposed"])
def test_tiles_of_many_rows(kind):
    sizes = (140, 0, 70)
    assert grouped_tile(rows_of_group(sum(sizes) + PAST, 3), 16, "", "").block_m == 128
    check(drawn((64, 64, 16), BF16, F32, sizes=sizes, **KINDS[kind]))


@pytest.mark.parametrize("nf4", [False, True])
def test_without_an_update(nf4):
    o = drawn((33, 64, 1), BF16, F32, sizes=(4, 1), adapter=False, nf4=nf4)
    check(o)
    got = run_ops(o)
    assert [got[name].shape for name in ("S", "dA", "dB")] == [(0,)] * 3


def test_ranks_of_several_tiles():
    check(drawn((33, 40, 70), BF16, F32, sizes=(4, 0, 9)))


def test_sums_that_several_programs_share():
    """Of S, where the groups are few."""
    sizes = (1 + PAST, 1, 1, 600, 4, 32)
    plan = grouped_products._shrink_plan(torch.device("cpu"), sizes, (0, 0, 1), 1.0, False)
    assert plan.grid[1] > 1
    check(drawn((16, 600, 4), F32, F32, sizes=(1,), through_rows=False))


def test_results_behind_rows_of_no_group():
    """Zero whatever memory held, and NaN there goes nowhere; gradients lie as their factors."""
    o = small()
    got = run_ops(o)
    for name in ("y", "S", "dx"):
        assert got[name][-PAST:].eq(0).all() and got[name].isfinite().all()
    for name, factor in (("dA", o.lora_A), ("dB", o.lora_B)):
        assert got[name].stride() == factor.stride() and got[name].dtype is factor.dtype
        assert got[name][1].eq(0).all() and got[name].isfinite().all()
    assert got["dbias"][1].eq(0).all() and got["dbias"].isfinite().all()


def test_operands_behind_other_strides():
    """The same bits as from contiguous ones."""

    def strided(t: Tensor) -> Tensor:
        wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), NAN)
        wide[..., ::2] = t
        return wide[..., ::2]

    o = small(through_rows=False)
    narrow = torch.full((3, 22, 30), NAN).to(BF16)
    narrow[:, 1:-1, 3:27] = o.weight
    names = ("x", "dy", "bias", "lora_A", "lora_B")
    changed = {name: strided(getattr(o, name)) for name in names}
    other = replace(o, weight=narrow[:, 1:-1, 3:27], **changed)
    assert_same_bits(run_ops(other), run_ops(o))


@pytest.mark.parametrize("runs", RUNS)
def test_equal_bits_every_time(runs):
    o = drawn((20, 32, 3), BF16, F32, sizes=(3, 0, 18), nf4=True)
    assert_same_every_time(lambda: run_ops(o).values(), runs)


def test_gradients_that_are_asked_for_alone():
    o = small()
    full = run_ops(o)
    for i, name in enumerate(GRADIENTS):
        got = run_ops(o, [i == j for j in range(4)])
        assert_same_bits(got[name], full[name])
        assert all(got[other].shape == (0,) for other in GRADIENTS if other != name)


@pytest.mark.parametrize("sizes", [(0, 0, 0), (0,)])
def test_no_row_of_a_group(sizes):
    o = drawn((20, 24, 4), BF16, F32, sizes=sizes)
    nothing = replace(o, rows=o.rows[:0], dy=o.dy[:0])
    for case, R in ((o, PAST), (nothing, 0)):
        got = run_ops(case)
        assert got["y"].shape == (R, 20) and got["dx"].shape == (R, 24)
        assert all(value.eq(0).all() for value in got.values())


def test_nan_and_inf_stay_in_their_row_and_group():
    o = small(through_rows=False)
    o.x[2, 3], o.dy[1, 2] = float("inf"), NAN
    got = run_ops(o)
    assert [i for i, y in enumerate(got["y"]) if not y.isfinite().all()] == [2]
    assert [i for i, dx in enumerate(got["dx"]) if not dx.isfinite().all()] == [1]
    assert [bool(dA.isfinite().all()) for dA in got["dA"]] == [False, True, False]
    assert [bool(db.isfinite().all()) for db in got["dbias"]] == [False, True, True]


@pytest.mark.parametrize("index", [-1, 3, 2**31 - 1])
def test_a_row_out_of_range_is_not_read_and_gives_nan(index):
    o = small()
    o = replace(o, x=o.x[:3], rows=o.rows.clamp(max=2))
    wanted, rows = run_ops(o), o.rows.clone()
    rows[3] = index
    got, others = run_ops(replace(o, rows=rows)), torch.arange(5 + PAST) != 3
    for name in ("y", "S"):
        assert got[name][3].isnan().all()
        assert_same_bits(got[name][others], wanted[name][others])
    assert got["dA"][2].isnan().any() and got["dA"][:2].isfinite().all()
    assert_same_bits(got["dx"], wanted["dx"])


@pytest.mark.parametrize("ends", [[-7, 2, 5], [5, 3, 1], [2, 2, 2**31 - 1], [9, -(2**31), 5]])
def test_wrong_offsets_read_nothing_out_of_bounds(ends):
    """Whatever comes out: raising would wait for the GPU."""
    run_ops(replace(small(), offsets=torch.tensor(ends, dtype=torch.int32)))


class Allocations(TorchDispatchMode):
    """The most elements that any operation returns."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not result._is_view():
            self.most = max(self.most, result.numel())
        return result


@pytest.mark.parametrize("kind", ["rows", "nf4"])
def test_nothing_of_the_size_of_one_weight_is_made(kind, monkeypatch):
    monkeypatch.setattr(grouped_products, "launch", lambda *args: None)  # interpreters copy
    o = drawn((96, 64, 2), BF16, F32, sizes=(1, 0, 1, 2), **KINDS[kind])
    with Allocations() as seen:
        run_ops(o, of=grouped_linear)
    assert 0 < seen.most < 96 * 64


@given(
    sizes=st.lists(st.integers(0, 300), min_size=1, max_size=20),
    past=st.integers(0, 300),
    block_m=st.sampled_from([16, 64, 128]),
)
def test_there_are_tiles_for_any_routing(sizes, past, block_m):
    needed = sum(ceil_div(size, block_m) for size in (*sizes, past))
    assert needed <= tiles_of_rows(sum(sizes) + past, len(sizes), block_m)


def test_refusals():
    o = small()
    weight = (o.weight, False)

    def forward(x=o.x, offsets=o.offsets, A=o.lora_A, B=o.lora_B, rows=o.rows):
        return grouped_linear.refusal_forward(x, rows, offsets, *weight, A, B)

    assert forward() is None and forward(A=None, B=None) is None
    assert forward(o.x.double()) == "the dtype is torch.float64"
    assert forward(A=o.lora_A.double()) == "the dtype of lora_A is torch.float64"
    assert "0 groups" in forward(offsets=o.offsets[:0])
    assert "4097 groups" in forward(offsets=o.offsets.new_zeros(4097))
    A, B = o.lora_A.new_zeros(3, 257, 24), o.lora_B.new_zeros(3, 20, 257)
    assert "the rank is 257" in forward(A=A, B=B)
    many = o.rows[:1].expand(2**30 + 1)
    assert "more than 1073741824 rows" in forward(rows=many)
    wide = o.weight[:1, :1].expand(1, 1 << 20, 24)
    many = many[: 1 << 28]
    more = grouped_linear.refusal_forward(o.x, many, o.offsets, wide, False, None, None)
    assert "more tiles than a launch has" in more
    factors, layout = (o.lora_A, o.lora_B), [0, 64, 0, 3, 20, 24]
    backward = grouped_linear.refusal_backward
    assert backward(o.dy, o.offsets, *weight, *factors) is None
    assert backward(o.dy, o.offsets, None, False, *factors) is None
    assert backward(o.dy, o.offsets, None, False, None, None) is None
    args = (o.x, o.rows, o.offsets, layout, *factors)
    assert grouped_linear.refusal_nf4_forward(*args) is None
    double = (o.dy.double(), o.offsets, layout, *factors)
    assert "float64" in grouped_linear.refusal_nf4_backward(*double)
